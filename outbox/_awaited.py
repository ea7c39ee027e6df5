"""What `Outbox.aadd` and its like return: a coroutine that cannot be taken for its result."""

from __future__ import annotations

import logging
from collections.abc import Coroutine, Generator
from typing import Any, Generic, TypeVar

log = logging.getLogger("outbox")

T_co = TypeVar("T_co", covariant=True)


class Awaited(Coroutine[Any, Any, T_co], Generic[T_co]):
    """A coroutine that is not true (``if outbox.aclaim(…)`` would be, for ever), and that says what was not done when it
    is thrown away: nothing keeps the transaction from committing without it, so at least the log has it, beside
    Python's own warning, which is printed once for each line of code.
    """

    __slots__ = ("_begun", "_consequence", "_coroutine", "_verb")

    def __init__(self, coroutine: Coroutine[Any, Any, T_co], verb: str, consequence: str) -> None:
        self._begun = False
        coroutine.__qualname__ = f"Outbox.{verb}"  # type: ignore[attr-defined]  # what Python's warning names
        self._coroutine = coroutine
        self._verb = verb
        self._consequence = consequence

    def __await__(self) -> Generator[Any, Any, T_co]:
        self._begun = True
        return self._coroutine.__await__()

    def send(self, value: Any) -> Any:
        self._begun = True
        return self._coroutine.send(value)

    def throw(self, *args: Any) -> Any:
        self._begun = True
        return self._coroutine.throw(*args)

    def close(self) -> None:
        self._begun = True
        self._coroutine.close()

    def __bool__(self) -> bool:
        raise TypeError(f"outbox.{self._verb}(…) has no result yet: write await outbox.{self._verb}(…)")

    def __del__(self) -> None:
        if not self._begun:
            log.error("outbox.%s(…) was never awaited: %s", self._verb, self._consequence)


__all__ = ["Awaited"]
