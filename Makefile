# All paths are relative: make cannot cope with spaces in absolute ones.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# Python would compile Airflow anew in each of hundreds of processes.
unexport PYTHONDONTWRITEBYTECODE
# It would hide what becomes of output that nobody reads.
unexport PYTHONUNBUFFERED

PG ?= 18
AIRFLOW ?= 3.3
JOBS ?= 4
ARGS ?=

ifeq ($(AIRFLOW),3.3)
VENV := .venv
EXTRAS := dev
CONSTRAINTS := constraints.txt
else ifeq ($(AIRFLOW),3.1)
VENV := .venv-airflow-3.1
EXTRAS := test
CONSTRAINTS := constraints-airflow-3.1.txt
else
$(error AIRFLOW=$(AIRFLOW) is unknown; use AIRFLOW=3.3 (the default) or AIRFLOW=3.1)
endif

PY := $(VENV)/bin/python
PIP := $(PY) -m pip -qq --disable-pip-version-check
READY := $(VENV)/.ready
SUITES ?= tests/core tests/server tests/airflow
TREES := engine/pg_freeze airflow_pg_freeze devtools tests $(wildcard demo benchmarks) $(patsubst %/,%,$(sort $(dir $(wildcard dags/*.py))))

.PHONY: help
help: ## this list
	@sed -nE 's/^([a-z0-9-]+):.*## (.*)/\1\t\2/p' Makefile | while IFS=$$'\t' read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

.PHONY: demo
demo: $(READY) ## freeze a busy database, snapshot it and thaw it, before your eyes
	$(PY) -m demo $(ARGS)

.PHONY: test
test: $(READY) ## all tests but the slowest; PG=16, PG=14,18, PG=all, AIRFLOW=3.1, SUITES=tests/core, JOBS=0 (in this process), ARGS='-k drain'
	PG=$(PG) $(PY) -m pytest -n $(JOBS) --maxschedchunk=1 $(wildcard $(SUITES)) $(ARGS)

.PHONY: e2e
e2e: $(READY) ## tests with real Airflow processes and real volumes; takes minutes
	PG=$(PG) $(PY) -m pytest tests/e2e -n 8 --maxschedchunk=1 $(ARGS)

.PHONY: wheels
wheels: $(READY) ## build both distributions, and try them in clean environments
	$(PY) -m pytest tests/wheels $(ARGS)

.PHONY: smoke
smoke: $(READY) ## that the benchmark and the count of torn copies run; their figures mean nothing
	$(PY) -m pytest tests/smoke $(ARGS)

.PHONY: check
check: $(READY) ## ruff, formatting, spelling (of names too), mypy strict
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m codespell_lib
	$(PY) -m mypy $(TREES)

.PHONY: crash-matrix
crash-matrix: $(READY) ## kill, cut and end a freeze at every statement; writes docs/crash-matrix.md
	CRASH_MATRIX=docs/crash-matrix.md $(PY) -m pytest --pg 18 tests/exhaustive $(ARGS)

.PHONY: bench
bench: $(READY) ## measure the outage, beside the script that this replaces
	$(PY) -m benchmarks $(ARGS)

.PHONY: pg15
pg15: ## install the server programs of PostgreSQL 15 (Debian, as root)
	apt-get install -y --no-install-recommends postgresql-15

.PHONY: venv
venv: $(READY) ## only set up the virtual environment that the other targets use

.PHONY: clean
clean: ## remove what the targets made
	rm -rf .venv .venv-airflow-* .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml engine/pyproject.toml $(CONSTRAINTS)
	@for python in python3.11 python3 python3.12 python3.13; do \
	    if "$$python" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$${found:-}" ]; then echo 'Python 3.11, 3.12 or 3.13 with its venv module is needed, and none is on the PATH.' >&2; exit 1; fi; \
	echo "Installing Airflow $(AIRFLOW) and the tools into $(VENV) with $$found; this takes a few minutes, once."; \
	"$$found" -m venv $(VENV)
	@# The constraints are the complete list: without a resolver they install in half the time. The second call resolves, and
	@# adds what is missing on another version of Python. uv is quicker, but does not read pip's configuration of an index.
	@if uv pip install --quiet --python $(PY) --no-deps --requirement $(CONSTRAINTS) 2>/dev/null; then install='uv pip install --quiet --python $(PY)'; \
	else install='$(PIP) install --no-compile'; $$install --no-deps --requirement $(CONSTRAINTS); fi; \
	$$install --editable ./engine --editable '.[$(EXTRAS)]' --constraint $(CONSTRAINTS)
	@touch $@
