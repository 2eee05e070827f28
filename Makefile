# Needs make and Python 3.11 or newer, nothing else: servers and tools are installed into .venv.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# The tests mostly wait: for the server, and for each other's locks.
JOBS   ?= $(shell echo $$((2 * $$(nproc 2>/dev/null || echo 1))))
PG     ?= 18
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.DEFAULT_GOAL := help
.PHONY: help demo test quick stop-servers supabase-tools test-supabase prove mutate bench picture lint dist clean

help:
	@echo 'make demo [ARGS=...]   play the whole story on a PostgreSQL 18 of its own; ARGS=--help lists more'
	@echo 'make test [ARGS=...]   run the tests on PostgreSQL 18; ARGS goes to pytest'
	@echo 'make quick [ARGS=...]  the same without the slow ones, PG and JOBS as with make test'
	@echo 'make test JOBS=0       in one process; the default is two processes for each core'
	@echo 'make test PG=17        run them on that version, 15 to 18'
	@echo 'make test-supabase     run those against PostgREST, supabase-js, the Supabase CLI, dbmate and Chromium; PG=15 or 17'
	@echo 'make supabase-tools    get what they need; Chromium is installed as a Debian package'
	@echo 'make prove [ARGS=...]  try to break exclusion: a million writes, 200 faults, naive rules; half an hour and more'
	@echo 'make mutate [ARGS=...] change the code at random and see whether a test notices; minutes a change, ARGS=--help'
	@echo 'make bench [ARGS=...]  measure what a statement costs the server, under arbiter and its alternatives; hours, ARGS=--help'
	@echo 'make picture           draw the picture of the README anew, from a run on a PostgreSQL 18 of its own'
	@echo 'make lint              ruff and mypy'
	@echo 'make dist              build the wheel and the source archive into dist/'
	@echo 'make stop-servers      end the servers that tests keep for the next run; after half an hour they end by themselves'
	@echo 'make clean             remove what the others made'

demo: $(VENV)/demo.stamp
	@$(BIN)/arbiter-db demo $(ARGS)

# Downloads missing programs into the user's cache directory: PgBouncer, and servers other than 16 and 18.
test: $(VENV)/test.stamp
	@$(BIN)/python -m arbiter_db.demo.embedded fetch $(PG)
	@PYTHONPATH=tests $(BIN)/python -m proof.pgbouncer fetch
	@PG=$(PG) $(BIN)/python -m pytest -n $(JOBS) $(ARGS)

quick: $(VENV)/test.stamp
	@$(BIN)/python -m arbiter_db.demo.embedded fetch $(PG)
	@PG=$(PG) $(BIN)/python -m pytest -n $(JOBS) -m 'not slow' $(ARGS)

# All but Chromium goes into the user's cache directory.
supabase-tools: $(VENV)/test.stamp
	@$(BIN)/python -m arbiter_db.demo.gateway fetch
	@PYTHONPATH=tests $(BIN)/python -m proof.pgbouncer fetch
	@PYTHONPATH=tests/supabase $(BIN)/python -m supabase_cli fetch
	@PYTHONPATH=tests/supabase $(BIN)/python -m happy_dom fetch
	@PYTHONPATH=tests/supabase $(BIN)/python -m dbmate fetch
	@command -v chromium >/dev/null \
	  || { apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium fonts-dejavu-core >/dev/null; } \
	  || { echo 'Chromium is needed: install the Debian package chromium' >&2; exit 1; }

test-supabase: supabase-tools
	@$(BIN)/python -m arbiter_db.demo.embedded fetch $(PG)
	@PG=$(PG) $(BIN)/python -m pytest -n $(JOBS) tests/supabase $(ARGS)

prove: $(VENV)/test.stamp
	@PYTHONPATH=tests $(BIN)/python -m proof.pgbouncer fetch
	@PYTHONPATH=tests $(BIN)/python -m proof $(ARGS)
	@PYTHONPATH=tests $(BIN)/python -m proof.interleavings

# A mutant is tried against the tests for Supabase, too, before it counts as one that survives.
mutate: $(VENV)/mutate.stamp supabase-tools
	@$(BIN)/python -m arbiter_db.demo.embedded fetch $(PG)
	@PG=$(PG) PYTHONPATH=tests $(BIN)/python -m mutate $(ARGS)

bench: $(VENV)/test.stamp
	@{ command -v redis-server && command -v valgrind; } >/dev/null \
	  || { apt-get update -qq && apt-get install -qq -y --no-install-recommends redis-server valgrind >/dev/null; } \
	  || { echo 'Redis and valgrind are needed: install the Debian packages redis-server and valgrind' >&2; exit 1; }
	@$(BIN)/python -m arbiter_db.demo.embedded fetch $(PG)
	@PYTHONPATH=tests $(BIN)/python -m bench --pg $(PG) $(ARGS)

picture: $(VENV)/test.stamp
	@PYTHONPATH=tests $(BIN)/python -m docs.picture

lint: $(VENV)/test.stamp
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy --strict

dist: $(VENV)/test.stamp
	@rm -rf dist
	@$(BIN)/python -m build --outdir dist .

stop-servers:
	@if [ -x $(BIN)/python ]; then $(BIN)/python tests/kept_server.py stop; fi

clean:
	-@$(MAKE) --no-print-directory stop-servers
	rm -rf $(VENV) dist build .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is newer than pyproject.toml as long as what it installed is up to date. The package
# itself is installed editable, so that changed files need no new installation.
$(VENV)/demo.stamp: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/test.stamp: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[test]'
	@touch $@ $(VENV)/demo.stamp

$(VENV)/mutate.stamp: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[mutate]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo 'Python 3.11 or newer is needed: make PYTHON=/path/to/python3' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
