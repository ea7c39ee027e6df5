"""``outbox demo``: a shop whose relay and consumer are killed while it sells; then everything is counted."""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from outbox.cli._common import print_json
from outbox.dialects import MYSQL
from outbox.errors import ConfigurationError
from outbox.stores._run import unavailable

CUSTOMERS = 200
POISON = 5


def register(commands: Any) -> None:
    parser = commands.add_parser("demo", help="see it work: a shop whose relay and consumer are killed while it sells")
    parser.add_argument("--orders", type=int, default=10_000, help="orders that commit (default: 10,000)")
    parser.add_argument("--kills", type=int, default=6, help="SIGKILLs, relay and consumer in turn (default: 6)")
    parser.add_argument("--database", metavar="URL", help="default: SQLite files in a temporary folder")
    parser.add_argument("--transport", metavar="URL", help="default: the local broker, a file in the same folder")
    parser.add_argument("--keep", action="store_true", help="leave the data to look at")
    parser.add_argument(
        "--seed", type=int, default=None, help="which orders roll back or are poison, and when kills come"
    )
    parser.add_argument("--json", action="store_true", help="the last line is a JSON object")
    parser.set_defaults(do=do)


def do(options: argparse.Namespace) -> int:
    """Exit status 0 only if every count is right."""
    if options.orders < 1 or options.kills < 0:
        raise ConfigurationError("--orders must be at least 1, --kills at least 0")
    # the shop reads these when it is imported, here and in the child processes
    token = uuid.uuid4().hex[:8]
    os.environ["OUTBOX_DEMO_TOPIC"] = f"outbox-demo-{token}"
    os.environ["OUTBOX_DEMO_SCHEMA"] = f"outbox_demo_{token}" if options.database else ""
    os.environ.pop("OUTBOX_DEMO_FIXED", None)
    from outbox.cli.demo.conduct import data_folder

    with data_folder(options.keep) as folder:
        return Demo(options, folder).run()


class Demo:
    """One run. Its parts: set up, sell and kill, let it settle, count, mend the bug, replay, count again."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        from outbox.stores.engine import sync_engine_for

        self.options, self.folder = options, folder
        self.seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 32)
        self.shop_url = options.database or f"sqlite:///{folder}/shop.db"
        self.billing_url = options.database or f"sqlite:///{folder}/billing.db"
        self.transport_url = options.transport or f"local://{folder}/broker.db?session=1"
        self.shop = sync_engine_for(self.shop_url, create=True)
        self.billing = sync_engine_for(self.billing_url, create=True)
        self.interactive = sys.stdout.isatty() and not options.json
        self._said = 0.0

    def run(self) -> int:
        started = time.monotonic()
        try:
            self._set_up()
            table, ok = self._sell_kill_count()
        except (sa.exc.OperationalError, sa.exc.InterfaceError) as error:
            raise unavailable(self.shop, error) from error
        finally:
            self._tear_down()
        table["seconds"] = round(time.monotonic() - started, 1)
        self._print(table, ok)
        return 0 if ok else 1

    # ------------------------------------------------------------ parts

    def _set_up(self) -> None:
        import asyncio

        from outbox.cli.demo.shop import TOPIC, Base, Customer
        from outbox.transports import open_transport

        schema = Base.metadata.schema
        for engine in (self.shop, self.billing):
            with engine.begin() as connection:
                if schema and engine is self.shop:
                    connection.execute(sa.schema.CreateSchema(schema, if_not_exists=True))
                Base.metadata.create_all(connection)
        with self.shop.begin() as connection:
            connection.execute(sa.insert(Customer), [{"id": n + 1, "orders": 0} for n in range(CUSTOMERS)])

        async def declare() -> None:
            transport = open_transport(self.transport_url)
            try:
                await transport.connect()
                await transport.declare([TOPIC], partitions=6)
            finally:
                await transport.close()

        asyncio.run(declare())
        self._say(
            f"seed {self.seed}; shop: {_shown(self.shop)}; broker: {self.transport_url.split('?')[0].split('@')[-1]}"
        )

    def _sell_kill_count(self) -> tuple[dict[str, Any], bool]:
        from outbox.cli.demo import count
        from outbox.cli.demo.conduct import Child, Placed, place_orders, wait_until

        o = self.options
        app = "outbox.cli.demo.shop"
        broker = ["--transport", self.transport_url]
        relay = Child(
            "relay",
            ["relay", "--app", f"{app}:outbox", "--database", self.shop_url, *broker, "--lease", "1", "--poll", "0.02"],
            self.folder / "relay.log",
            {},
        )
        consumer = Child(
            "consumer",
            ["consume", f"{app}:billing", "--database", self.billing_url, *broker, "--member", "billing-1"],
            self.folder / "consumer.log",
            {},
        )
        children = [relay, consumer]
        placed = Placed()
        try:
            for child in children:
                child.start()
            threads = 1 if self.shop.dialect.name == "sqlite" else 4
            selling = place_orders(self.shop, o.orders, CUSTOMERS, POISON, threads, placed, self.seed)
            rng = random.Random(self.seed)
            # spread over the time in which orders are placed, and a little after it
            at = sorted(rng.uniform(0.05, 1.15) for _ in range(o.kills))
            handled = 0

            def progress() -> int:
                nonlocal handled
                handled = self._handled()
                return handled

            def next_kill() -> bool:
                if placed.errors:
                    raise placed.errors[0]
                self._progress(placed.committed, progress(), relay.kills + consumer.kills)
                share = (placed.committed + handled) / (2 * o.orders)
                return share >= min(at[0] / 1.2, 0.98) if at else not selling.is_alive()

            while at:
                wait_until(next_kill, children, 120 + o.orders / 50, "the next kill")
                at.pop(0)
                children[(relay.kills + consumer.kills) % 2].kill()

            def settled() -> bool:
                if placed.errors:
                    raise placed.errors[0]
                self._progress(placed.committed, progress(), relay.kills + consumer.kills)
                return not selling.is_alive() and self._pending() == 0 and handled >= o.orders

            wait_until(settled, children, 120 + o.orders / 50, "that every message is sent and handled")
            relay.stop()
            topic = count.records(self.transport_url, o.orders)
            before = count.effects(self.shop, self.billing)

            # the bug is mended, and what failed because of it is replayed
            consumer.stop()
            consumer.environment["OUTBOX_DEMO_FIXED"] = "1"
            consumer.start()
            replayed = self._replay()
            wait_until(lambda: self._charged() >= o.orders, [consumer], 60, "that the replayed messages are handled")
            after = count.effects(self.shop, self.billing)
        finally:
            for child in children:
                child.stop()
        table: dict[str, Any] = {
            "orders": self._orders(),
            "rolled_back": placed.rolled_back,
            "kills": relay.kills + consumer.kills,
            "sent": topic.sent,
            "duplicates": topic.duplicates,
            "effects": before.effects,
            "dead_letters": before.dead_letters,
            "reasons": before.reasons,
            "replayed": replayed,
            "effects_after_replay": after.effects,
            "dead_letters_after_replay": after.dead_letters,
            "lost": before.lost + after.lost,
            "doubled": after.doubled,
            "ghosts": after.ghosts,
            "out_of_order": after.out_of_order,
        }
        poison = min(POISON, o.orders)
        ok = (
            table["orders"] == o.orders == after.effects
            and table["sent"] - table["duplicates"] == o.orders
            and before.effects == o.orders - poison
            and before.dead_letters == replayed == poison
            and after.dead_letters == 0
            and not any(table[name] for name in ("lost", "doubled", "ghosts", "out_of_order"))
        )
        return table, ok

    def _tear_down(self) -> None:
        from outbox.cli.demo.shop import Base

        if not self.options.keep and Base.metadata.schema:
            # where the database cannot be reached there is nothing to remove, and the first error is the one to see
            with contextlib.suppress(sa.exc.OperationalError), self.shop.begin() as connection:
                # MySQL's schema is a database: all of it goes, and no CASCADE is to be said
                cascade = self.shop.dialect.name not in MYSQL
                connection.execute(sa.schema.DropSchema(Base.metadata.schema, cascade=cascade, if_exists=True))
        self.shop.dispose()
        self.billing.dispose()

    # ------------------------------------------------------------ asking the databases

    def _scalar(self, engine: sa.Engine, statement: sa.Select[Any]) -> int:
        with engine.connect() as connection:
            return connection.scalar(statement) or 0

    def _orders(self) -> int:
        from outbox.cli.demo.shop import Order

        return self._scalar(self.shop, sa.select(sa.func.count()).select_from(Order))

    def _pending(self) -> int:
        from outbox.cli.demo.shop import outbox

        return self._scalar(self.shop, sa.select(sa.func.count()).select_from(outbox.tables.message))

    def _handled(self) -> int:
        """Orders that have their effect, or a dead letter."""
        from outbox.cli.demo.shop import outbox

        return self._charged() + self._scalar(
            self.billing, sa.select(sa.func.count()).select_from(outbox.tables.dead_letter)
        )

    def _charged(self) -> int:
        from outbox.cli.demo.shop import Charge

        return self._scalar(self.billing, sa.select(sa.func.count(sa.distinct(Charge.order_id))))

    def _replay(self) -> int:
        from outbox import DeadLetters
        from outbox.cli.demo.shop import outbox

        return (
            DeadLetters(outbox, database=self.billing).replay(consumer="billing", why="the voucher bug is mended").count
        )

    # ------------------------------------------------------------ talking

    def _say(self, text: str) -> None:
        print(text, flush=True)

    def _progress(self, committed: int, handled: int, kills: int) -> None:
        now = time.monotonic()
        if now - self._said < (0.1 if self.interactive else 3.0):
            return
        self._said = now
        total = self.options.orders
        bar = "█" * (30 * handled // max(1, total))
        line = f"[{bar:<30}] {committed:,} orders committed, {handled:,} handled, {kills} killed"
        print(f"\r{line}" if self.interactive else line, end="" if self.interactive else "\n", flush=True)

    def _print(self, table: dict[str, Any], ok: bool) -> None:
        rows = [
            ("orders committed", table["orders"]),
            ("orders rolled back, never seen again", table["rolled_back"]),
            ("SIGKILLs of relay and consumer", table["kills"]),
            ("messages in the broker", table["sent"]),
            ("  of these sent again after a kill", table["duplicates"]),
            ("effects", table["effects"]),
            ("dead letters", table["dead_letters"]),
            *((f"  {reason}", number) for reason, number in table["reasons"].items()),
            ("replayed after the bug fix", table["replayed"]),
            ("effects then", table["effects_after_replay"]),
            ("lost", table["lost"]),
            ("doubled", table["doubled"]),
            ("effects of orders that were rolled back", table["ghosts"]),
            ("out of order", table["out_of_order"]),
        ]
        print("\n" if self.interactive else "")
        for name, value in rows:
            print(f"  {name:<45} {value:>9,}")
        verdict = "All counts are right." if ok else "SOMETHING IS WRONG."
        print(f"\n  {verdict} ({table['seconds']} s, counted from the databases and the topic)")
        if self.options.keep:
            print(
                f"  Left to look at: {self.folder}"
                + (f", schema {os.environ['OUTBOX_DEMO_SCHEMA']}" if self.options.database else "")
            )
        if self.options.json:
            print_json({**table, "ok": ok})


def _shown(engine: sa.Engine) -> str:
    return engine.url.render_as_string(hide_password=True)
