"""What an ``sqs://`` URL says."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Final

from outbox.errors import ConfigurationError
from outbox.transports._url import Url, a_count, require_known, yes_or_no

PARAMETERS: Final = (
    "dead_letters",
    "declare",
    "delivery_timeout_ms",
    "endpoint_url",
    "fifo",
    "groups",
    "max_message_bytes",
    "profile",
    "queue",
    "requests",
    "refresh_ms",
    "visibility_timeout_ms",
    "wait_ms",
)

DEFAULT_MAX_MESSAGE: Final = 1_048_576
"""Bytes of body and attributes: the service's limit since August 2025 (before: 262,144). A queue may have a smaller one."""
SEPARATOR: Final = "__"
_PLACEHOLDER: Final = re.compile(r"\{([^{}]*)\}")
_NAME: Final = re.compile(r"[A-Za-z0-9_-]+")
_LONGEST: Final = 80  # characters of a queue's name, with its .fifo


@dataclass(frozen=True, slots=True)
class Settings:
    """How to reach the service, and what topics and groups are called there. Durations in seconds, sizes in bytes."""

    region: str | None = None
    """None: as the AWS configuration says."""
    endpoint_url: str | None = None
    access_key: str | None = None
    secret_key: str | None = field(default=None, repr=False)
    profile: str | None = None
    fifo: bool = False
    queue: str = "{topic}__{group}"
    dead_letters: str = "{queue}-dlq"
    groups: tuple[str, ...] = ()
    """The groups of every topic, where they are not to be looked for."""
    declare: bool = True
    """Whether queues that are missing are made; else they are only looked for."""
    delivery_timeout: float = 10.0
    """How long a publish may take until its messages count as not sent, whatever the cause."""
    visibility_timeout: float = 30.0
    """After which the messages of a member that died come again."""
    wait: int = 5
    """How long one request waits for messages, and so at most a close for the last of them."""
    refresh: float = 5.0
    """How old what is known of a topic's queues may be."""
    requests: int = 16
    """At the same time, for publishing, and as many for reading."""
    max_message_bytes: int = DEFAULT_MAX_MESSAGE

    @property
    def by_group(self) -> bool:
        """Whether a topic has a queue for each group; else one for all of them."""
        return "{group}" in self.queue

    def queue_of(self, topic: str, group: str) -> str:
        """Raises `ConfigurationError` for what can be no queue's name."""
        values = {"topic": _part("topic", topic, self.by_group), "group": _part("group", group, self.by_group)}
        name = self._named(_PLACEHOLDER.sub(lambda match: values[match[1]], self.queue), f"topic {topic!r}")
        if self.is_dead_letters(name):
            raise ConfigurationError(f"sqs: group {group!r} of topic {topic!r}: {name!r} is a name of dead letters")
        return name

    def prefix_of(self, topic: str) -> str:
        """What the names of a topic's queues begin with, and no other topic's."""
        head = self.queue.partition("{group}")[0]
        return head.replace("{topic}", _part("topic", topic, self.by_group))

    def dead_letters_of(self, queue: str) -> str:
        return self._named(self.dead_letters.replace("{queue}", queue.removesuffix(".fifo")), f"queue {queue!r}")

    def is_dead_letters(self, name: str) -> bool:
        """Whether a queue of that name is another one's dead letters."""
        head, _, tail = self.dead_letters.partition("{queue}")
        name = name.removesuffix(".fifo")
        return name.startswith(head) and name.endswith(tail) and len(name) > len(head) + len(tail)

    def _named(self, name: str, whose: str) -> str:
        name += ".fifo" if self.fifo else ""
        if len(name) > _LONGEST or not _NAME.fullmatch(name.removesuffix(".fifo")):
            raise ConfigurationError(
                f"sqs: {whose}: {name!r} can be no queue: up to {_LONGEST} letters, digits, '-' and '_' are possible "
                "(the URL parameter queue=… makes other names)"
            )
        return name


def _part(what: str, name: str, by_group: bool) -> str:
    """A dot, which queues' names may not have, is an underscore. Where topic and group are both in the name, what could be
    read in two ways is refused."""
    part = name.replace(".", "_")
    if by_group and (SEPARATOR in part or part.startswith("_") or part.endswith("_")):
        raise ConfigurationError(
            f"sqs: {what} {name!r}: no '_' or '.' at its ends, nor two side by side: that is what divides a queue's name "
            "into topic and group"
        )
    return part


def settings(url: Url) -> Settings:
    """Raises `ConfigurationError` for whatever does not fit together."""
    require_known(url, PARAMETERS)
    if url.path not in ("", "/") or ":" in url.hosts or "," in url.hosts:
        raise ConfigurationError("sqs: write sqs://region/?endpoint_url=…, for example sqs://eu-central-1")
    if (url.username is None) != (url.password is None):
        raise ConfigurationError("sqs: an access key and its secret go together; the URL has only one of them")
    endpoint = url.parameters.get("endpoint_url")
    if endpoint is not None and not re.fullmatch(r"https?://[^/@]+/?", endpoint):
        raise ConfigurationError("sqs: endpoint_url is http://host:port or https://host:port")
    return Settings(
        url.hosts or None,
        endpoint_url=endpoint,
        access_key=url.username,
        secret_key=url.password,
        profile=url.parameters.get("profile"),
        fifo=url.parameter("fifo", False, yes_or_no),
        queue=url.parameter("queue", "{topic}__{group}", _queue),
        dead_letters=url.parameter("dead_letters", "{queue}-dlq", _dead_letters),
        groups=tuple(group for group in url.parameters.get("groups", "").split(",") if group),
        declare=url.parameter("declare", True, yes_or_no),
        delivery_timeout=url.parameter("delivery_timeout_ms", 10_000, a_count(100, 3_600_000)) / 1000,
        visibility_timeout=url.parameter("visibility_timeout_ms", 30_000, a_count(2_000, 43_200_000)) / 1000,
        wait=math.ceil(url.parameter("wait_ms", 5_000, a_count(0, 20_000)) / 1000),
        refresh=url.parameter("refresh_ms", 5_000, a_count(0, 600_000)) / 1000,
        requests=url.parameter("requests", 16, a_count(1, 256)),
        max_message_bytes=url.parameter("max_message_bytes", DEFAULT_MAX_MESSAGE, a_count(1024, DEFAULT_MAX_MESSAGE)),
    )


def _queue(text: str) -> str:
    names = _PLACEHOLDER.findall(text)
    rest = _PLACEHOLDER.sub("", text)
    if names not in (["topic"], ["topic", "group"]) or re.search(r"[{}]", rest):
        raise ValueError("holds {topic}, or {topic} and {group} in this order")
    if len(names) == 2 and SEPARATOR not in text.partition("{topic}")[2].partition("{group}")[0]:
        raise ValueError(f"needs {SEPARATOR} between {{topic}} and {{group}}, which no topic or group has in it")
    return text


def _dead_letters(text: str) -> str:
    if text.count("{queue}") != 1 or text == "{queue}":
        raise ValueError("holds {queue} and more")
    return text
