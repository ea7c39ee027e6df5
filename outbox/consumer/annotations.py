"""What a handler's annotations mean, also where they are text (``from __future__ import annotations``), name classes of an
enclosing function, or were imported under ``if TYPE_CHECKING``."""

from __future__ import annotations

import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final

from sqlalchemy.orm import Session

from outbox._message import Message

# Often imported for type checkers only, and always meant when they are written here.
_WELL_KNOWN: Final = {"Session": "sync", "AsyncSession": "async", "Message": "message"}


class Unresolved(Exception):
    """An annotation names something that does not exist (yet)."""


def resolve(annotation: Any, function: Callable[..., Any], local: Mapping[str, Any]) -> Any:
    """The object that an annotation names; `inspect.Parameter.empty` where there is none. Raises `Unresolved`.

    ``local``: names of the place where the handler was registered.
    """
    if not isinstance(annotation, str):
        return annotation
    plain = plain_function(function)
    names: dict[str, Any] = dict(getattr(plain, "__globals__", {}))
    names.update(local)
    code, closure = getattr(plain, "__code__", None), getattr(plain, "__closure__", None)
    for name, cell in zip(code.co_freevars if code else (), closure or (), strict=False):
        try:
            names[name] = cell.cell_contents
        except ValueError:  # assigned later
            continue
    try:
        return eval(annotation, names)  # the handler's own source text
    except Exception as error:
        raise Unresolved(f"{annotation!r}: {error}") from error


def plain_function(function: Any) -> Any:
    """The function behind a decorated one, a partial, a bound method, or an object that can be called."""
    plain = inspect.unwrap(function) if callable(function) else function
    while isinstance(plain, functools.partial):
        plain = inspect.unwrap(plain.func)
    plain = getattr(plain, "__func__", plain)
    if not inspect.isroutine(plain) and not isinstance(plain, type):
        plain = vars(type(plain)).get("__call__", plain)
    return plain


def strip(annotation: Any) -> Any:
    """Without ``Annotated`` and without ``| None``."""
    if typing.get_origin(annotation) is Annotated:
        return strip(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(annotation) if member is not types.NoneType]
        if len(members) == 1:
            return strip(members[0])
    return annotation


def takes_none(annotation: Any) -> bool:
    """Whether None (a tombstone) is among what the annotation allows."""
    if typing.get_origin(annotation) is Annotated:
        return takes_none(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return any(takes_none(member) for member in typing.get_args(annotation))
    return annotation in (Any, object, None, types.NoneType, Message, inspect.Parameter.empty)


def role(annotation: Any) -> str | None:
    """``sync`` or ``async`` for a session, ``message`` for a `Message`, else None. An annotation that could not be
    resolved is judged by its last word."""
    if isinstance(annotation, str):
        return _WELL_KNOWN.get(annotation.partition("|")[0].strip().rpartition(".")[2])
    annotation = strip(annotation)
    if not isinstance(annotation, type):
        return None
    if issubclass(annotation, Session):
        return "sync"
    if issubclass(annotation, Message):
        return "message"
    module = sys.modules.get("sqlalchemy.ext.asyncio")
    return "async" if module is not None and issubclass(annotation, module.AsyncSession) else None
