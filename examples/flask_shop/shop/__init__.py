"""A shop that takes orders over HTTP and charges for them in another process."""

from __future__ import annotations

import os

from flask import Flask

from shop.messaging import outbox
from shop.models import db


def create_app() -> Flask:
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = os.environ.get("SHOP_DATABASE", "sqlite:///shop.db")
    db.init_app(app)
    outbox.init_app(app)

    from shop.views import views

    app.register_blueprint(views)
    app.cli.command("create-tables", help="An app that lives longer has Flask-Migrate instead.")(db.create_all)
    return app
