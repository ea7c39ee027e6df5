"""For the tests of applications: what was added to the outbox, and its delivery, without a relay or a broker.

`capture`, `drain`; as pytest fixtures: `outbox_capture`, `outbox_drain`. For those who write a transport:
`outbox.testing.conformance`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from outbox.testing._capture import Captured, capture
    from outbox.testing._drain import Drained, drain

# Loaded when first asked for: the pytest plugin in this package is imported by every run of pytest.
_LATER = {
    "Captured": "outbox.testing._capture",
    "Drained": "outbox.testing._drain",
    "capture": "outbox.testing._capture",
    "drain": "outbox.testing._drain",
}


def __getattr__(name: str) -> object:
    if name in _LATER:
        from importlib import import_module

        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module 'outbox.testing' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_LATER]  # so that help() shows them


__all__ = ["Captured", "Drained", "capture", "drain"]
