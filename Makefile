# Every target sets up what it needs: .venv is made on first use and again when the requirements change.
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Processes side by side beat threads side by side on the small matrices of the tests.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: train test test-all lint type format docs dist audit bench

train: $(INSTALLED)  ## train on Meta-World MT10; ARGS="..." adds overrides
	$(BIN)/python -m varshare_rl.train $(ARGS)

test: $(INSTALLED)  ## all tests but the slow ones; ARGS="..." adds pytest's options
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(INSTALLED)  ## all tests, the learning runs that take minutes included
	$(PYTEST) $(ARGS)

lint: $(INSTALLED)  ## style, formatting and the import rules
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

type: $(INSTALLED)  ## strict type checking
	$(BIN)/mypy

format: $(INSTALLED)  ## put the code in form
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(INSTALLED)  ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --quiet

dist: $(INSTALLED)  ## a wheel in dist/, tried in empty environments with the tested, oldest and newest versions
	$(BIN)/python tests/empty_environments.py $(ARGS)

audit: $(INSTALLED)  ## known vulnerabilities of the versions in constraints.txt, in the index's advisories
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip --disable-pip-version-check install -q pip-audit
	build/audit/bin/pip-audit -r constraints.txt --no-deps --disable-pip

bench: $(INSTALLED)  ## speed, scale and memory, on a quiet machine (half an hour); ARGS="..." chooses
	$(BIN)/python -m experiments.bench $(ARGS)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is missing or older than 3.11: install Python 3.11, or name one: make PYTHON=/path/to/python3.11" >&2; \
		exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e ".[dev]"
	@touch $(INSTALLED)
