"""What may be sent behind a message that was not."""

from __future__ import annotations

import asyncio

from outbox.transports._pipeline import EVERYTHING, Pipeline


async def turns() -> None:
    """Let the loop do what `leave` put off."""
    for _ in range(4):
        await asyncio.sleep(0)


async def test_calls_that_entered_before_a_failure_was_known_fail_as_well() -> None:
    pipeline = Pipeline()
    first, second = pipeline.enter(), pipeline.enter()
    pipeline.fail("orders")
    assert pipeline.blocked(second, "orders")
    pipeline.leave({"orders"})
    await turns()
    assert pipeline.blocked(first, "orders")
    assert pipeline.blocked(second, "orders")
    assert not pipeline.blocked(pipeline.enter(), "orders")


async def test_other_topics_go_on() -> None:
    pipeline = Pipeline()
    pipeline.enter()
    second = pipeline.enter()
    pipeline.fail("orders")
    assert not pipeline.blocked(second, "payments")
    assert not pipeline.blocked(second, EVERYTHING)


async def test_a_call_that_enters_before_the_failed_one_has_returned_fails() -> None:
    pipeline = Pipeline()
    pipeline.enter()
    pipeline.fail(EVERYTHING)
    late = pipeline.enter()
    assert pipeline.blocked(late, EVERYTHING)
    pipeline.leave({EVERYTHING})
    # the task that awaits the failed call has not run yet, so its caller cannot know
    assert pipeline.blocked(pipeline.enter(), EVERYTHING)
    await turns()
    assert not pipeline.blocked(pipeline.enter(), EVERYTHING)


async def test_a_call_that_failed_because_of_another_one_blocks_until_it_has_returned_too() -> None:
    pipeline = Pipeline()
    pipeline.enter()
    pipeline.fail("orders")
    second = pipeline.enter()
    assert pipeline.blocked(second, "orders")
    pipeline.fail("orders")
    pipeline.leave({"orders"})
    await turns()
    # of what the second one held, the caller knows nothing yet
    assert pipeline.blocked(pipeline.enter(), "orders")
    pipeline.leave({"orders"})
    await turns()
    assert not pipeline.blocked(pipeline.enter(), "orders")


async def test_many_topics_that_failed_once_are_not_remembered_for_ever() -> None:
    pipeline = Pipeline()
    for number in range(5000):
        pipeline.enter()
        pipeline.fail(f"topic-{number}")
        pipeline.leave({f"topic-{number}"})
        await turns()
    assert len(pipeline._closed_until) <= 2000
