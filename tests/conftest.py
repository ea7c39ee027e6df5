"""What all tests share: the servers they run against (tests/services/fixtures.py)."""

pytest_plugins = ["tests.services.fixtures"]
