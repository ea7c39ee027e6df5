"""Dead letters: messages that were given up, kept with the reason until somebody replays or discards them."""

from outbox.dead_letters._dead_letters import DeadLetters, Replayed
from outbox.dead_letters.letter import DeadLetter, Group
from outbox.dead_letters.plan import Destination, Plan

__all__ = ["DeadLetter", "DeadLetters", "Destination", "Group", "Plan", "Replayed"]
