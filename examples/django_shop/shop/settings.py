"""Django's settings, as few as there can be."""

from __future__ import annotations

SECRET_KEY = "only to try it"
ALLOWED_HOSTS = ["127.0.0.1"]
ROOT_URLCONF = "shop.urls"
INSTALLED_APPS = ["shop"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": "shop.db",
        # SQLite has one writer, and there are three processes: wait for it when a transaction begins, not when it writes
        "OPTIONS": {"transaction_mode": "IMMEDIATE", "timeout": 20},
    }
}
