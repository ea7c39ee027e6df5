"""The table of what each transport can do, in the guide, is what their flags say."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from outbox.transport import Capabilities, Transport
from outbox.transports import open_transport

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"
URLS = ("kafka://broker", "amqp://broker", "sqs://region", "sqs://region?fifo=yes", "local:broker.db", "memory:")


def table() -> str:
    transports = [open_transport(url) for url in URLS]
    lines = ["| | " + " | ".join(map(_name, URLS, transports)) + " |", "|---" * (len(URLS) + 1) + "|"]
    for flag in fields(Capabilities):
        said = [_said(getattr(one.capabilities, flag.name)) for one in transports]
        lines.append(f"| `{flag.name}` | " + " | ".join(said) + " |")
    return "\n".join(lines)


def _name(url: str, transport: Transport) -> str:
    return f"{transport.name}, FIFO" if "fifo=yes" in url else transport.name


def _said(value: bool | int | None) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else f"{value:,}"


def test_the_guide_holds_the_table_of_capabilities() -> None:
    assert table() in GUIDE.read_text(), f"put this into {GUIDE.name}:\n{table()}"
