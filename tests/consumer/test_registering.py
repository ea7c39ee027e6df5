"""What is said of a consumer, or of a handler, that is written down wrongly."""

from __future__ import annotations

from typing import Any

import pytest

from outbox import ConfigurationError, Consumer
from tests.consumer.billing import OrderPlaced, outbox


def consumer() -> Any:
    """Without its types: what is tried here, a type checker refuses too."""
    return Consumer("billing", outbox)


def test_on_without_parentheses_is_refused() -> None:
    billing = consumer()
    with pytest.raises(
        ConfigurationError,
        match=r"consumer 'billing', handler .*charge: @billing\.on needs what it handles: .*@billing\.on\(OrderPlaced\)",
    ):

        @billing.on
        def charge(event: OrderPlaced) -> None: ...

    assert billing.topics == ()


def test_on_a_callable_object_without_parentheses_is_refused() -> None:
    class Charge:
        def __call__(self, event: OrderPlaced) -> None: ...

    with pytest.raises(ConfigurationError, match=r"needs what it handles"):
        consumer().on(Charge())


def test_on_with_empty_parentheses_is_refused() -> None:
    billing = consumer()
    for arguments in ({}, {"type": "order.placed"}):
        with pytest.raises(ConfigurationError, match=r"@billing\.on\(.*\) needs what it handles: .*type="):

            @billing.on(**arguments)
            def charge(event: OrderPlaced) -> None: ...


@pytest.mark.parametrize("what", [None, 7, b"orders", dict, "", "a\x00b"])
def test_what_is_no_topic_and_no_declared_class_is_refused_at_once(what: object) -> None:
    billing = consumer()
    with pytest.raises(ConfigurationError, match=r"consumer 'billing'.*on\("):
        billing.on(what)  # the line itself, also where nothing is decorated


def test_swapped_arguments_are_said() -> None:
    swapped: Any = Consumer
    with pytest.raises(ConfigurationError, match=r"arguments are swapped: write Consumer\('billing', outbox\)"):
        swapped(outbox, "billing")
    with pytest.raises(ConfigurationError, match=r"arguments are swapped"):
        swapped(outbox=outbox.__class__.__name__, name=outbox)


@pytest.mark.parametrize("what", [None, "billing", 7, outbox.metadata])
def test_an_outbox_is_needed(what: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"consumer 'billing'.*its second argument is your Outbox, not a"):
        Consumer("billing", what)


def test_a_name_is_needed() -> None:
    name: Any = None
    with pytest.raises(ConfigurationError, match="its name has 1 to 128 characters"):
        Consumer(name, outbox)
