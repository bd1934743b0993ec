# The two commands of the README: `make demo` and `make test`. Both make `.venv` first; nothing else is needed but Python.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.made

.PHONY: env demo test check slow lock clean

env: $(STAMP)

# The stamp holds the environment until a dependency changes.
$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make env PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable '.[zero,tune,dev]'
	@touch $(STAMP)

demo: env
	$(BIN)/genrec demo

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest

slow: env
	$(BIN)/python -m pytest -m slow

# Writes down the versions of this environment as the tested ones.
lock: env
	$(BIN)/python -m pip freeze --exclude-editable | grep -vi '^\(pip\|setuptools\|wheel\)==' > requirements.lock

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
