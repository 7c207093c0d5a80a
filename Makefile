# Everything here sets itself up: a machine with make and Python 3.11+ (with venv) is enough.

# The first Python that is new enough and can make a venv; `make PYTHON=/path/to/python3.12 …` chooses another. The distribution's own
# comes first: it is built with optimisation, which one made by hand often is not (15 % of the throughput).
find_python = for p in /usr/bin/python3 python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done
PYTHON ?= $(shell $(find_python))

# The Pythons of `make test-all`: those that are there. `make test-all PYTHONS="/opt/python3.12/bin/python3 python3.13"`
PYTHONS ?= python3.11 python3.12 python3.13

PYTEST_ARGS ?= -n 2 --dist loadfile

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test crash chaos fuzz check coverage crowd scale pace format golden test-all clean

help:
	@echo 'make demo      three tenants, their providers, and the relay on 127.0.0.1:2525'
	@echo 'make test      the test suite'
	@echo 'make crash     the crash tests at length, with counts: power cuts, kills, failing disks; some minutes'
	@echo 'make chaos     ten minutes of broken connections to upstreams, with the account; CHAOS_SECONDS=60 makes it a minute'
	@echo 'make fuzz      a million mutated sessions, with figures; INPUTS=1000 makes so many for each of three kinds of listener'
	@echo 'make check     ruff, mypy, and the import directions'
	@echo 'make coverage  every branch of what decides the fate of mail is tested'
	@echo 'make format    let ruff format and fix'
	@echo 'make pace      how exactly rates are kept, over a minute, with figures'
	@echo 'make crowd     5,000 idle connections and 200 slow senders, with figures'
	@echo 'make scale     10,000 tenants, and 100,000 messages queued for an upstream that hangs, with figures'
	@echo 'make golden    rewrite the expected outputs in tests/golden; review the diff'
	@echo 'make test-all  the test suite under each Python in PYTHONS that is there'
	@echo 'make clean     remove environments and caches'

demo: $(READY)
	@$(BIN)/relay demo

test: $(READY)
	$(BIN)/pytest $(PYTEST_ARGS)

crash: $(READY)
	RELAY_CRASH=1 $(BIN)/pytest -s tests/crash

chaos: $(READY)
	RELAY_CHAOS=$(or $(CHAOS_SECONDS),600) $(BIN)/pytest -q -s tests/system/test_chaos.py

fuzz: $(READY)
	RELAY_FUZZ=$(or $(INPUTS),340000) $(BIN)/pytest -q -s --timeout 0 tests/fuzz/test_sessions.py

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_layers.py

# Units and contracts alone: a branch that only a whole relay reaches by chance is not tested.
# The tests of what decides: all of tests/unit would take ten times as long and add nothing.
DECIDES := attempt backlog breaker bounce delivery dsn delivery_limits intake outcome pace probes report retry rounds scheduler scheduler_pace scheduler_stop settle timeline verified wait

coverage: $(READY)
	$(BIN)/coverage run --branch --include='relay/mail/outcome.py,relay/mail/bounce.py,relay/delivery/*' \
		-m pytest -q $(DECIDES:%=tests/unit/test_%.py)
	$(BIN)/coverage report --show-missing --fail-under=100

crowd: $(READY)
	CROWD=1 $(BIN)/pytest -q -s tests/system/test_crowd.py

scale: $(READY)
	SCALE=1 $(BIN)/pytest -q -s tests/system/test_scale.py

pace: $(READY)
	PACE=1 $(BIN)/pytest -q -s --timeout 0 tests/system/test_pace.py

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

golden: $(READY)
	$(BIN)/pytest -q --rewrite-golden

$(READY): pyproject.toml
	@test -x $(BIN)/python || test -n "$(PYTHON)" || { echo 'relay needs Python 3.11 or newer, with venv' >&2; exit 1; }
	@test -x $(BIN)/python || { echo 'setting up $(VENV) …'; $(PYTHON) -m venv $(VENV); }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

test-all:
	@set -e; ran=; for python in $(PYTHONS); do \
		version=$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) \
			|| { echo "== $$python: not here"; continue; }; \
		echo "== $$python: Python $$version"; \
		$(MAKE) --no-print-directory test VENV=.venv-$$version PYTHON=$$python; ran="$$ran $$version"; \
	done; test -n "$$ran" || { echo 'none of PYTHONS is here' >&2; exit 1; }; echo "== passed on$$ran"

clean:
	rm -rf .venv .venv-* .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage build dist *.egg-info
	find relay tests -name __pycache__ -type d -prune -exec rm -rf {} +
