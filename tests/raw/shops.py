"""The shop of tests/staging in each kind of database, and how each driver connects to it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import aiosqlite
import asyncmy
import asyncpg
import psycopg
import psycopg2
import pymysql
import sqlalchemy as sa

from tests.staging.shop import Shop


class RawShop(Shop):
    """A shop, and the URL that its database has for a driver: ``postgresql://…``, ``mysql://…``, ``sqlite:///…``."""

    def __init__(self, engine: sa.Engine, url: str) -> None:
        super().__init__(engine)
        self.url = sa.make_url(url)

    @property
    def dsn(self) -> str:
        return self.url.render_as_string(hide_password=False)

    @property
    def mysql(self) -> dict[str, Any]:
        return {"host": self.url.host, "port": self.url.port, "user": self.url.username, "database": self.url.database}


def _mysqlclient(shop: RawShop) -> Any:
    import MySQLdb

    return MySQLdb.connect(**shop.mysql)


SYNC: dict[str, tuple[str, Callable[[RawShop], Any]]] = {
    "psycopg": ("postgresql", lambda shop: psycopg.connect(shop.dsn)),
    "psycopg2": ("postgresql", lambda shop: psycopg2.connect(shop.dsn)),
    "sqlite3": ("sqlite", lambda shop: sqlite3.connect(str(shop.url.database))),
    "pymysql": ("mariadb", lambda shop: pymysql.connect(**shop.mysql)),
}
if find_spec("MySQLdb"):  # is compiled where it is installed, against the database's C library
    SYNC["mysqlclient"] = ("mariadb", _mysqlclient)


async def _psycopg(shop: RawShop) -> Any:
    return await psycopg.AsyncConnection.connect(shop.dsn)


async def _asyncpg(shop: RawShop) -> Any:
    return await asyncpg.connect(shop.dsn)


async def _aiosqlite(shop: RawShop) -> Any:
    return await aiosqlite.connect(str(shop.url.database))


async def _asyncmy(shop: RawShop) -> Any:
    return await asyncmy.connect(**{name.replace("database", "db"): value for name, value in shop.mysql.items()})


ASYNC: dict[str, tuple[str, Callable[[RawShop], Any]]] = {
    "asyncpg": ("postgresql", _asyncpg),
    "psycopg": ("postgresql", _psycopg),
    "aiosqlite": ("sqlite", _aiosqlite),
    "asyncmy": ("mariadb", _asyncmy),
}
