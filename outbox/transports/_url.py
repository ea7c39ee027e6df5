"""Transport URLs: taken apart by hand, because `urllib` knows one host where Kafka has several; never printed whole."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeVar
from urllib.parse import parse_qsl, unquote

from outbox.errors import ConfigurationError

_SECRET: Final = re.compile(r"password|passwd|secret|token|credential", re.IGNORECASE)
_PARAMETER: Final = re.compile(r"([?&])([^=&#]*)=([^&#]*)")
_HOSTS: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:,\[\]/]+)(:\d+)?(,(\[[0-9A-Fa-f:.]+\]|[^:,\[\]/]+)(:\d+)?)*")

T = TypeVar("T")
D = TypeVar("D")


@dataclass(frozen=True, slots=True)
class Url:
    """The parts of ``scheme://username:password@hosts/path?parameters``, percent-decoded."""

    scheme: str
    hosts: str = ""
    """``host:port,host:port`` as it was written, without the user."""
    path: str = ""
    """What follows the hosts, with its leading slash; of ``local:relative.db``, which has no ``//``, all after the colon."""
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    parameters: Mapping[str, str] = field(default_factory=dict, repr=False)

    def parameter(self, name: str, default: D, read: Callable[[str], T]) -> T | D:
        """One parameter as ``read`` sees it. Raises `ConfigurationError` that names it where ``read`` raises ValueError."""
        text = self.parameters.get(name)
        if text is None:
            return default
        try:
            return read(text)
        except ValueError as error:
            shown = "***" if _SECRET.search(name) else repr(text)
            raise ConfigurationError(f"{self.scheme}: URL parameter {name}={shown}: {error}") from None


def parse(text: str) -> Url:
    """The parts of a URL. Raises `ConfigurationError`, whose text never holds a password."""
    scheme, colon, rest = text.partition(":")
    if not colon or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        raise ConfigurationError("a transport URL begins with its scheme, as in kafka://host:9092 or local:messages.db")
    scheme = scheme.lower()
    rest, _, fragment = rest.partition("#")
    if fragment:
        raise ConfigurationError(f"{redacted(text)}: a '#' in a transport URL means nothing; write it as %23")
    body, _, query = rest.partition("?")
    parameters = _parameters(scheme, query)
    if not body.startswith("//"):
        return Url(scheme, path=unquote(body), parameters=parameters)
    authority, slash, path = body[2:].partition("/")
    user, at, hosts = authority.rpartition("@")
    if "@" in path or (hosts and not _HOSTS.fullmatch(hosts)):
        # Most often a password with a '/', '?' or '@' in it: say so and show nothing.
        raise ConfigurationError(
            f"{scheme}: the URL's hosts cannot be read; write them as host:port,host:port, and the characters "
            "/ ? # @ : % of a user name or password percent-encoded (urllib.parse.quote(password, safe=''))"
        )
    username, password_given, password = user.partition(":")
    if unquote(password) == "***":
        raise ConfigurationError(
            f"{scheme}: the URL's password is ***, which is what printing a URL leaves of it "
            "(str(url) does that); give the real one, for SQLAlchemy url.render_as_string(hide_password=False)"
        )
    return Url(
        scheme,
        hosts=hosts,
        path=unquote(slash + path),
        username=unquote(username) if at else None,
        password=unquote(password) if password_given else None,
        parameters=parameters,
    )


def _parameters(scheme: str, query: str) -> dict[str, str]:
    found: dict[str, str] = {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError:
        raise ConfigurationError(f"{scheme}: what follows the '?' of the URL must be name=value&name=value") from None
    for name, value in pairs:
        if name in found:
            raise ConfigurationError(f"{scheme}: the URL has the parameter {name} twice")
        if value == "***" and _SECRET.search(name):
            raise ConfigurationError(f"{scheme}: URL parameter {name} is ***, which is what printing leaves of it")
        found[name] = value
    return found


def require_known(url: Url, known: Collection[str]) -> None:
    """Raises `ConfigurationError` for a parameter that is not among ``known``, and lists those."""
    for name in url.parameters:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ConfigurationError(
                f"{url.scheme}: there is no URL parameter {name}{hint}; known are {', '.join(sorted(known))}"
            )


def redacted(text: str) -> str:
    """The URL with *** in place of its password and of every parameter that holds a secret, fit for logs.

    With an '@' behind the first '?', which a password that was not percent-encoded may have brought there, it cannot be told
    what is secret: then all after the scheme is ***.
    """
    head, question, query = text.partition("?")
    scheme, separator, body = head.partition("://")
    if "@" in query:
        return f"{scheme.partition(':')[0]}://***"
    if not separator:
        return head + _redacted_query(question + query)
    user, at, rest = body.rpartition("@")  # a '/' or '@' before the last '@' is part of the password
    name, colon, _ = user.partition(":")
    shown = f"{name}{':***' if colon else ''}@{rest}" if at else body
    return f"{scheme}://{shown}{_redacted_query(question + query)}"


def _redacted_query(query: str) -> str:
    return _PARAMETER.sub(lambda m: f"{m[1]}{m[2]}=***" if _SECRET.search(unquote(m[2])) else m[0], query)


def a_number(least: float, most: float) -> Callable[[str], float]:
    """A reader of numbers between two bounds, for `Url.parameter`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            raise ValueError(f"must be a number from {least:g} to {most:g}")
        return value

    return read


def a_count(least: int, most: int) -> Callable[[str], int]:
    """A reader of whole numbers between two bounds, for `Url.parameter`."""

    def read(text: str) -> int:
        if not text.isdecimal() or len(text) > 18 or not least <= int(text) <= most:
            raise ValueError(f"must be a whole number from {least} to {most}")
        return int(text)

    return read


def one_of(*choices: str) -> Callable[[str], str]:
    """A reader of one of some words, in any case, for `Url.parameter`."""

    def read(text: str) -> str:
        for choice in choices:
            if text.lower() == choice.lower():
                return choice
        raise ValueError(f"must be one of {', '.join(choices)}")

    return read


def yes_or_no(text: str) -> bool:
    """A reader of true/false, yes/no, 1/0, for `Url.parameter`."""
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise ValueError("must be true or false")
