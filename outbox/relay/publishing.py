"""One call of the transport, whatever it does, and what it tells about the broker."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from outbox._outgoing import Outgoing
from outbox.relay.circuit import EVERYTHING, Circuits
from outbox.relay.parking import ParkedKey, key_of
from outbox.transport import SENT, Outcome, Publisher

log = logging.getLogger("outbox.relay")

FEW = 16  # rows that are tried one by one, to find the one that a transport stumbles over


async def publish(
    transport: Publisher, rows: Sequence[Outgoing], circuits: Circuits, *, parked: bool = False
) -> list[Outcome]:
    """An outcome for each row, in order; ``circuits`` follow them. A transport that raises breaks its contract, and
    holds up no one but the message it raises for."""
    try:
        outcomes = await _call(transport, rows)
    except Exception as error:
        log.error("the transport raised instead of answering for %d messages", len(rows), exc_info=error)
        if parked and len(rows) == 1 and EVERYTHING not in circuits:
            outcomes = [Outcome.retry(_said(error), error)]  # it failed before, while others got through
        else:
            outcomes = await _one_by_one(transport, rows, error)
    if outcomes.count(SENT) == len(outcomes):
        if circuits:
            _works(circuits, {row.topic for row in rows})
        return outcomes
    _works(circuits, {row.topic for row, o in zip(rows, outcomes, strict=True) if o.kind == "sent"})
    for row, outcome in zip(rows, outcomes, strict=True):
        if outcome.kind == "unavailable":
            scope = EVERYTHING if outcome.scope == "transport" else row.topic
            if circuits.failed(scope, outcome.reason):
                log.error("%s is unavailable, no attempt is spent: %s", circuits.what(scope), outcome.reason)
    return outcomes


async def _call(transport: Publisher, rows: Sequence[Outgoing]) -> list[Outcome]:
    outcomes = await transport.publish(rows)
    if len(outcomes) != len(rows):
        raise RuntimeError(f"{transport.name}: {len(outcomes)} outcomes for {len(rows)} messages")
    return outcomes


async def _one_by_one(transport: Publisher, rows: Sequence[Outgoing], error: Exception) -> list[Outcome]:
    """Which of them it was. Where none gets through alone either, it is the broker, and no attempt is spent; so too
    with many: fewer are tried next."""
    down = Outcome.unavailable(_said(error), error)
    if not 1 < len(rows) <= FEW:
        return [down] * len(rows)
    outcomes: list[Outcome] = []
    failing: set[ParkedKey] = set()
    for row in rows:
        key = key_of(row)
        if key is not None and key in failing:
            outcomes.append(Outcome.retry("waits behind a message of its key"))
            continue
        try:
            outcomes += await _call(transport, [row])
        except Exception as own:
            outcomes.append(Outcome.retry(_said(own), own))
        if key is not None and outcomes[-1].kind in ("retry", "unavailable"):
            failing.add(key)
    if any(outcome.kind in ("sent", "reject") for outcome in outcomes):
        return outcomes
    return [down] * len(rows)


async def close(transport: Publisher, *, abort: bool) -> None:
    """Let go of the broker, within some seconds and without raising."""
    try:
        await asyncio.wait_for(transport.close(abort=abort), 5.0)
    except Exception as error:
        log.error("closing the transport failed: %s", error or type(error).__name__, exc_info=error)


def _said(error: Exception) -> str:
    return f"the transport raised {type(error).__name__}: {error}"


def _works(circuits: Circuits, topics: set[str]) -> None:
    for scope in (EVERYTHING, *topics) if topics else ():
        if circuits.succeeded(scope):
            log.info("%s is available again", circuits.what(scope))
