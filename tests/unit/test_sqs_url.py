"""What an ``sqs://`` URL may say, and what topics and groups are called in SQS."""

from __future__ import annotations

import itertools

import pytest

from outbox.errors import ConfigurationError
from outbox.transports._sqs_settings import Settings, settings
from outbox.transports._url import parse


def of(url: str) -> Settings:
    return settings(parse(url))


def test_names() -> None:
    assert of("sqs://eu-central-1").queue_of("orders", "billing") == "orders__billing"
    assert of("sqs://").queue_of("audit.login", "mail-er") == "audit_login__mail-er"
    assert of("sqs://?fifo=yes").queue_of("orders", "billing") == "orders__billing.fifo"
    assert of("sqs://?fifo=yes").dead_letters_of("orders__billing.fifo") == "orders__billing-dlq.fifo"
    assert of("sqs://?queue=shop-{topic}").queue_of("orders", "whoever") == "shop-orders"
    own = of("sqs://?queue=shop-{topic}__x-{group}-y&dead_letters=dead-{queue}")
    assert own.queue_of("orders", "billing") == "shop-orders__x-billing-y"
    assert own.prefix_of("orders") == "shop-orders__x-"
    assert own.dead_letters_of("a") == "dead-a"


def test_no_two_topics_and_groups_share_a_queue_or_look_like_each_others() -> None:
    """What divides topic and group is never part of either. (A dot is an underscore: who has both would share a queue.)"""
    parts = ["".join(some) for length in (1, 2, 3) for some in itertools.product("a_-", repeat=length)]
    found = of("sqs://")
    seen: dict[str, tuple[str, str]] = {}
    for topic, group in itertools.product(parts, parts):
        try:
            name = found.queue_of(topic, group)
        except ConfigurationError:
            continue
        assert seen.setdefault(name, (topic, group)) == (topic, group)
    topics = {topic for topic, _ in seen.values()}
    for name, (of_topic, _) in seen.items():
        assert [topic for topic in topics if name.startswith(found.prefix_of(topic))] == [of_topic]
    assert len(seen) > 100


@pytest.mark.parametrize(
    ("topic", "group", "said"),
    [
        ("a__b", "g", "nor two side by side"),
        ("a..b", "g", "nor two side by side"),
        ("a_", "g", "no '_' or '.' at its ends"),
        ("a", ".g", "no '_' or '.' at its ends"),
        ("größe", "g", "can be no queue"),
        ("a" * 80, "g", "up to 80 letters"),
        ("a", "g-dlq", "is a name of dead letters"),
    ],
)
def test_what_can_be_no_queue_is_told(topic: str, group: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        of("sqs://").queue_of(topic, group)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("sqs://eu-central-1/queue", "write sqs://region"),
        ("sqs://localhost:4566", "write sqs://region"),
        ("sqs://key@eu-central-1", "the URL has only one of them"),
        ("sqs://?endpoint_url=localhost:4566", "endpoint_url is http://host:port"),
        ("sqs://?fifoo=yes", r"did you mean fifo\?"),
        ("sqs://?queue={group}", "holds {topic}, or {topic} and {group}"),
        ("sqs://?queue={topic}-{group}", "needs __ between"),
        ("sqs://?queue={topic}__{group}__{topic}", "in this order"),
        ("sqs://?dead_letters={queue}", "holds {queue} and more"),
        ("sqs://?visibility_timeout_ms=100", "from 2000 to 43200000"),
        ("sqs://?wait_ms=30000", "from 0 to 20000"),
    ],
)
def test_what_does_not_fit_together_is_told(url: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        of(url)


def test_a_secret_is_not_shown() -> None:
    assert "s3cret" not in repr(of("sqs://key:s3cret@eu-central-1"))


@pytest.mark.parametrize(("milliseconds", "seconds"), [(0, 0), (1, 1), (300, 1), (1000, 1), (1001, 2), (20_000, 20)])
def test_a_poll_waits_for_whole_seconds(milliseconds: int, seconds: int) -> None:
    """Less than half a second was none, and the service was asked as often as it could answer."""
    assert of(f"sqs://eu-central-1/?wait_ms={milliseconds}").wait == seconds
