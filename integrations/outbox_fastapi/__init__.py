"""pyoutbox in FastAPI: a session that commits before the response is sent, and a relay and consumers in the app's process.

```python
get_session = session_dependency(SessionLocal)
app = FastAPI(lifespan=lifespan(relay=Relay(outbox)))

@app.post("/orders")
def place(order: NewOrder, session: Annotated[Session, Depends(get_session, scope="function")]) -> Placed: ...
```
"""

from __future__ import annotations

from outbox import MissingExtra

try:
    import fastapi as _fastapi  # noqa: F401  # asked for here, so that what is missing is said at the import
except ModuleNotFoundError as error:
    raise MissingExtra(
        "outbox_fastapi needs FastAPI, which is not installed: pip install 'pyoutbox[fastapi]'"
    ) from error

from outbox_fastapi._lifespan import Running, lifespan
from outbox_fastapi._session import session_dependency

__all__ = ["Running", "lifespan", "session_dependency"]
