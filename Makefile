# Everything here works on a machine with Python >= 3.11 (with venv) and make; no root, no Docker.
# `make run` and `make test` bring their own environment: see install and install-dev.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/sh

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --require-hashes

RUN_LOCK := deploy/requirements.lock
DEV_LOCK := deploy/requirements-dev.lock
BENCH_LOCK := deploy/requirements-bench.lock

# A stamp stands for "this lock is installed"; a changed lock makes it stale.
RUN_STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
BENCH_STAMP := $(VENV)/.installed-bench

.PHONY: help
help: ## Show every target with one line
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: run
run: $(RUN_STAMP) ## Serve on http://127.0.0.1:8000 with the embedded store (or REDIS_URL)
	@exec $(BIN)/python -m app

# Each of three processes rewrites the assertions of all tests where they are not kept.
.PHONY: test
test: $(DEV_STAMP) ## Run the whole test suite, real Valkey included (pass more with ARGS=)
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest $(ARGS)

# One after the other: what is measured is how long things take. A soak alone takes half an hour.
.PHONY: chaos
chaos: $(DEV_STAMP) ## Break stores, networks and the service; print what it cost; takes over an hour (RUNS=, ARGS=)
	$(BIN)/python -m pytest tests/faults -n 0 --timeout 3600 -m "" --chaos $(if $(RUNS),--runs $(RUNS)) $(ARGS)

# Nothing else should run beside it. Node, where it is there, brings Fastify as a contestant.
.PHONY: bench
bench: $(BENCH_STAMP) ## Measure against what people use instead, hold it to the budget; takes ten minutes (ROUNDS=, ARGS=)
	$(BIN)/python -m tests.bench $(if $(ROUNDS),--rounds $(ROUNDS)) $(ARGS)

.PHONY: lint
lint: $(DEV_STAMP) ## Check style (ruff) and types (mypy --strict)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: check
check: lint test ## Lint, types and tests: what .ci/run runs

.PHONY: format
format: $(DEV_STAMP) ## Rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: install
install: $(RUN_STAMP) ## Make .venv and install what the service needs

.PHONY: install-dev
install-dev: $(DEV_STAMP) ## The same, with what the tests and the linters need

.PHONY: lock
lock: $(DEV_STAMP) ## Compile all locks anew from pyproject.toml
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-annotate --no-header --no-emit-index-url --no-emit-find-links --upgrade \
		--python-version 3.11 pyproject.toml -o $(RUN_LOCK)
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-annotate --no-header --no-emit-index-url --no-emit-find-links --upgrade \
		--python-version 3.11 --extra dev --constraint $(RUN_LOCK) pyproject.toml -o $(DEV_LOCK)
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-annotate --no-header --no-emit-index-url --no-emit-find-links --upgrade \
		--python-version 3.11 --extra bench --constraint $(DEV_LOCK) pyproject.toml -o $(BENCH_LOCK)

.PHONY: clean
clean: ## Remove the environment and the caches; the data in .data stays
	rm -rf $(VENV) .bench .mypy_cache .pytest_cache .ruff_cache .hypothesis dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) was not found; set PYTHON to a Python >= 3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: Python >= 3.11 is needed; $(PYTHON) is older (set PYTHON=...)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(RUN_STAMP): $(RUN_LOCK) | $(BIN)/python
	$(PIP) -r $(RUN_LOCK)
	@touch $@

$(DEV_STAMP): $(DEV_LOCK) $(RUN_STAMP)
	$(PIP) -r $(DEV_LOCK)
	@touch $@

$(BENCH_STAMP): $(BENCH_LOCK) $(DEV_STAMP)
	$(PIP) -r $(BENCH_LOCK)
	@touch $@
