# Everything a contributor or CI runs. `make` alone lists it.

.DEFAULT_GOAL := help

VENV := .venv
VENV_SA20 := .venv-sa20
BIN := $(VENV)/bin

# The first Python that is new enough; `make PYTHON=…` takes another.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$python"; break; }; \
	done)

# Extra arguments, as in `make test ARGS="-k relay"`.
ARGS ?=

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --- Environments. A stamp says what is installed in one; a newer pyproject.toml makes it old.
# What installing prints goes to stderr: `make -s services` has a shell to evaluate its stdout.

define create_venv
	@[ -n "$(PYTHON)" ] || { echo "pyoutbox needs Python 3.11 or newer, and none is on the PATH." >&2; \
		echo "Install one, or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) comes without venv and pip. On Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	"$(PYTHON)" -m venv $(1)
	@# The pip that comes with older Pythons knows no dependency groups.
	$(1)/bin/pip install -q --upgrade pip >&2
	@echo '*' > $(1)/.gitignore
	@touch $@
endef

$(VENV)/.created:
	$(call create_venv,$(VENV))

$(VENV_SA20)/.created:
	$(call create_venv,$(VENV_SA20))

# The package alone, which is all that the demo needs.
$(VENV)/.installed: $(VENV)/.created pyproject.toml
	$(BIN)/pip install -q -e . >&2
	@touch $@

$(VENV)/.dev: $(VENV)/.created pyproject.toml
	$(BIN)/pip install -q -e '.[all]' --group dev >&2
	@touch $(VENV)/.installed $@

$(VENV_SA20)/.dev: $(VENV_SA20)/.created pyproject.toml
	$(VENV_SA20)/bin/pip install -q -e '.[all]' --group test 'SQLAlchemy>=2.0.36,<2.1' >&2
	@touch $@

.PHONY: install
install: $(VENV)/.dev ## Make the development environment in .venv

# --- What people come for

.PHONY: demo
demo: $(VENV)/.installed ## Watch messages go through an outbox: no broker, no database server
	@$(BIN)/outbox demo $(ARGS)

# Several processes, each with servers of its own; the tests of a file stay together. They wait for servers more than they
# compute: three keep two cores busy.
PARALLEL := -n 3 --dist loadfile

.PHONY: test
test: $(VENV)/.dev ## Run all tests, on SQLAlchemy 2.1 and the core's on 2.0; starts the servers they need
	$(BIN)/pytest $(PARALLEL) $(ARGS)
	@$(MAKE) --no-print-directory test-sa20 ARGS=

.PHONY: test-sa20
test-sa20: $(VENV_SA20)/.dev ## Run the tests of the core on SQLAlchemy 2.0
	$(VENV_SA20)/bin/pytest $(PARALLEL) $(wildcard tests/unit tests/staging tests/raw/test_*connections.py) $(ARGS)

# What holds on the databases of `make test` holds on the oldest and the newest. Of the relay and the consumer, what differs
# from database to database: their processes, kills and brokers do not.
MATRIX := $(wildcard tests/stores tests/staging tests/migrations tests/outages tests/cleanup/test_days.py) \
	$(wildcard $(addprefix tests/relay/test_,leases.py parking.py peers.py life.py at_random.py)) \
	$(wildcard $(addprefix tests/consumer/test_,effect.py failures.py failure_texts.py replay.py))

.PHONY: test-matrix
test-matrix: $(VENV)/.dev ## Run what touches databases on PostgreSQL 14, on PostgreSQL 18 and on MySQL 9
	OUTBOX_TEST_POSTGRESQL_URL= OUTBOX_TEST_POSTGRESQL_VERSION=14 \
		$(BIN)/pytest $(PARALLEL) --on=postgresql $(MATRIX) $(ARGS)
	OUTBOX_TEST_POSTGRESQL_URL= OUTBOX_TEST_POSTGRESQL_VERSION=18 OUTBOX_TEST_MARIADB=mysql \
		$(BIN)/pytest $(PARALLEL) --on=postgresql,mariadb $(MATRIX) $(ARGS)

.PHONY: unit
unit: $(VENV)/.dev ## Run the tests that need no server
	$(BIN)/pytest tests/unit $(ARGS)

CHECKS := check-lint check-format check-types check-imports

# The make of macOS is too old to keep the output of parallel targets apart.
SYNC := $(if $(filter output-sync,$(.FEATURES)),--output-sync=target)

.PHONY: check $(CHECKS)
check: $(VENV)/.dev ## Lint, formatting, types, and the direction of imports
	@$(MAKE) --no-print-directory -j$(words $(CHECKS)) $(SYNC) $(CHECKS)

check-lint:
	$(BIN)/ruff check

check-format:
	$(BIN)/ruff format --check

check-types:
	$(BIN)/mypy
	$(BIN)/mypy -p tests.services

check-imports:
	$(BIN)/lint-imports

.PHONY: format
format: $(VENV)/.dev ## Format the code and mend what ruff can mend
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

.PHONY: bench
bench: $(VENV)/.dev ## Measure throughput and latency
	$(BIN)/python -m benchmarks $(ARGS)

# --- Servers for tests run by hand: eval "$(make -s services)"

.PHONY: services
services: $(VENV)/.dev ## Start the tests' servers and leave them running; prints their addresses
	@$(BIN)/python -m tests.services start $(ARGS)

.PHONY: services-stop
services-stop: $(VENV)/.dev ## Stop them
	@$(BIN)/python -m tests.services stop $(ARGS)

.PHONY: clean
clean: ## Remove build results and caches; the environments stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
