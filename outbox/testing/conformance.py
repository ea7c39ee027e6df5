"""What every transport must do, as tests. Whoever writes one runs them with a few lines:

    from outbox.testing.conformance import TransportConformance

    class TestCarrierPigeon(TransportConformance):
        @pytest.fixture
        def transport_url(self, loft):
            return f"pigeon://{loft.address}"

It needs pytest-asyncio. What a transport cannot do, by its `Capabilities`, is skipped; the class attributes say the rest.
Each test makes topics and groups of its own, so that one broker serves all of them.
"""

from __future__ import annotations

import pytest

# Before they are imported, so that a failed assertion shows its values in the projects of others too.
pytest.register_assert_rewrite(
    "outbox.testing._conformance",
    "outbox.testing._conformance_groups",
    "outbox.testing._conformance_publishing",
    "outbox.testing._conformance_reading",
)

from outbox.testing._conformance import ids, key_of, message, numbered  # noqa: E402
from outbox.testing._conformance_groups import Groups  # noqa: E402
from outbox.testing._conformance_publishing import Publishing  # noqa: E402
from outbox.testing._conformance_reading import Reading  # noqa: E402

__all__ = ["TransportConformance", "ids", "key_of", "message", "numbered"]


class TransportConformance(Publishing, Groups, Reading):
    """All of it. Subclass it and define the fixture ``transport_url``; override `open_one` for transports without a URL."""
