"""Kafka's groups under load: members come, go and are killed, and partitions change hands."""

from __future__ import annotations

from collections import Counter

import pytest

from outbox.testing.conformance import ids
from tests.transports.churn import Churn
from tests.transports.kafka_tools import Open
from tests.transports.relaying import first_deliveries, in_order

KEYS = 40


@pytest.mark.timeout(180)
async def test_members_that_come_and_go_under_load_skip_nothing_and_turn_no_key_around(
    opened: Open, kafka_url: str, name: str
) -> None:
    transports = [opened(kafka_url) for _ in range(4)]
    await transports[0].declare([name], partitions=6)
    churn = Churn(name, f"{name}-group", KEYS)
    churn.produce(transports[3])
    for number in range(3):
        churn.join(number, transports[number])
        await churn.all_have_some(*range(number + 1))
    await churn.leave(0)
    await churn.all_have_some(1, 2)
    churn.join(3, transports[0])
    await churn.all_have_some(1, 2, 3)
    await churn.finish([1, 2, 3])
    assert first_deliveries(churn.found) == in_order(churn.count, KEYS)
    twice = len(churn.log) - churn.count
    print(f"{churn.count} in, {len(set(ids(churn.found)))} out, {twice} twice")
    # a member that is asked to let go forgets what it has not handled: at most one hand-out each time
    assert twice <= 20 * 6


@pytest.mark.timeout(180)
@pytest.mark.parametrize("static", [False, True])
async def test_a_member_that_is_killed_under_load_costs_duplicates_at_most(
    opened: Open, kafka_url: str, name: str, static: bool
) -> None:
    transports = [opened(kafka_url) for _ in range(4)]
    await transports[0].declare([name], partitions=6)
    churn = Churn(name, f"{name}-group", KEYS)
    churn.produce(transports[3])
    for number in range(2):
        churn.join(number, transports[number], member=f"member-{number}" if static else None)
    await churn.all_have_some(0, 1)
    await churn.kill(0, transports[0])
    if static:  # it comes back under its name, and has its partitions at once
        churn.join(2, transports[2], member="member-0")
        await churn.all_have_some(1, 2, within=5)
        await churn.finish([1, 2])
    else:  # its partitions are taken over when its session has ended
        churn.join(2, transports[2])
        await churn.all_have_some(1, 2)
        await churn.finish([1, 2])
    assert first_deliveries(churn.found) == in_order(churn.count, KEYS)
    again = Counter(ids(churn.found))
    print(f"{churn.count} in, {len(again)} out, {len(churn.log) - churn.count} twice")
    assert len(again) == churn.count
