"""pyoutbox in Flask, with Flask-SQLAlchemy: the outbox on ``db``, consumers that write through ``db.session``, and
``flask outbox status``.

```python
db = SQLAlchemy()
outbox = Outbox(db)
billing = Consumer("billing", outbox)

def create_app():
    app = Flask(__name__)
    db.init_app(app)
    outbox.init_app(app)
    return app
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from outbox import MissingExtra

_INSTALL = "which is not installed: pip install 'pyoutbox[flask]'"

try:
    import flask as _flask  # noqa: F401  # asked for here, so that what is missing is said at the import
except ModuleNotFoundError as error:
    raise MissingExtra(f"outbox_flask needs Flask, {_INSTALL}") from error

if TYPE_CHECKING:
    from outbox_flask._consumer import Consumer
    from outbox_flask._outbox import Outbox

_LATER = {"Consumer": "outbox_flask._consumer", "Outbox": "outbox_flask._outbox"}


def __getattr__(name: str) -> object:
    # Later, since every `flask` command imports this package for `flask outbox`: also where there is no Flask-SQLAlchemy.
    if name not in _LATER:
        raise AttributeError(f"module 'outbox_flask' has no attribute {name!r}")
    from importlib import import_module

    try:
        value: object = getattr(import_module(_LATER[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "flask_sqlalchemy":
            raise
        raise MissingExtra(f"outbox_flask needs Flask-SQLAlchemy, {_INSTALL}") from error
    globals()[name] = value
    return value


__all__ = ["Consumer", "Outbox"]
