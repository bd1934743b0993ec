# The two commands of the README: `make demo` and `make test`. Both make `.venv` first; nothing else is needed but Python.
#   PYTHON=/path/to/python3.12   the Python to build on; by default the first of 3.11 to 3.13 that is found
#   LOCK=                        do not hold the environment to the tested versions (for a platform that lacks one of them)
PYTHON ?=
LOCK ?= requirements.lock
EXTRAS ?= zero,tune,remote,llama,serve,track,dev
BIN := .venv/bin
STAMP := .venv/.made
# Test files side by side. One thread a process: threads that wait for others of another process spin, and take ten times as long.
PROCESSES ?= 2
# GPUs are hidden: two ranks of a test would share one, and tolerances are those of a CPU. Those of `-m gpu` alone use them.
PYTEST := OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest

# Of the sample of faults among the tests; another value makes other attacks (docs/faults.md).
FAULTS_SEED ?= 1
export FAULTS_SEED

.PHONY: env demo test check slow faults gpu docs dist lock clean

env: $(STAMP)

# The stamp holds the environment until a dependency changes. `ensurepip` is asked for because Debian ships Python without it.
# pip retries a connection by itself, but not a download that breaks off: hence the loop.
$(STAMP): pyproject.toml requirements.lock
	@chosen=; \
	for candidate in $(or $(PYTHON),python3 python3.12 python3.11 python3.13); do \
	  if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < $(if $(PYTHON),(4,),(3, 14)))' 2>/dev/null; \
	  then chosen=$$candidate; break; fi; \
	done; \
	if [ -z "$$chosen" ]; then \
	  echo "Python 3.11 to 3.13 with venv is needed, none of these is one: $(or $(PYTHON),python3 python3.12 python3.11 python3.13); install it or name it: make env PYTHON=/path/to/python3.12" >&2; exit 1; \
	fi; \
	version='import sys; print(sys.version_info[:2])'; \
	if [ -e .venv ] && [ "$$($(BIN)/python -c "$$version" 2>/dev/null)" != "$$("$$chosen" -c "$$version")" ]; then rm -rf .venv; fi; \
	echo "making .venv with $$("$$chosen" --version): about 3 GB (5 GB and more with CUDA) and some minutes"; \
	"$$chosen" -m venv .venv
	@$(BIN)/python -m pip install --quiet --upgrade pip || echo "pip stays at the version Python came with"
	@for wait in 5 20 0; do \
	  $(BIN)/python -m pip install --quiet --retries 8 --timeout 60 $(if $(LOCK),--constraint $(LOCK)) --editable '.[$(EXTRAS)]' && exit 0; \
	  if [ $$wait -gt 0 ]; then echo "pip failed, trying again in $$wait s" >&2; sleep $$wait; fi; \
	done; \
	echo "the packages could not be installed: read pip's lines above; where a tested version does not exist for this platform: make env LOCK=" >&2; exit 1
	@touch $(STAMP)

demo: env
	$(BIN)/genrec demo

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# All tests in one session, the default ones among them: what takes longest is begun first, beside it the rest.
test: check
	@echo "make test runs, on two cores in about 15 minutes, beside each other: the default tests; -m ranks, real ranks, kills and clusters;"; \
	echo "-m demo, the whole demo judged. One part alone:"; \
	echo "  .venv/bin/python -m pytest -n 2      .venv/bin/python -m pytest -m ranks      .venv/bin/python -m pytest tests/unit/model"; \
	echo "The sample of faults is that of FAULTS_SEED=$(FAULTS_SEED)."
	$(PYTEST) -m 'not slow' -n $(PROCESSES) --durations 20 --durations-min 4

slow: env
	$(PYTEST) -m slow

# A thousand attacks on the program; SEED and ONLY repeat one of them, as it says itself.
faults: env
	$(BIN)/python tests/faults/run.py --processes $(PROCESSES) $(if $(SEED),--seed $(SEED)) $(if $(ONLY),--only $(ONLY))

# On a machine with an NVIDIA GPU: the tests that need one.
gpu: env
	$(BIN)/python -m pytest -m gpu

# The documentation site in build/site: the command reference from the commands, the API from docstrings.
docs: env
	$(BIN)/python -m pip install --quiet $(if $(LOCK),--constraint $(LOCK)) --editable '.[$(EXTRAS),docs]'
	$(BIN)/python -m typer genrec_dist.cli.app utils docs --name genrec --output docs/reference/commands.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# A source archive and a wheel in dist/, with metadata that an index takes.
dist: env
	$(BIN)/python -m pip install --quiet $(if $(LOCK),--constraint $(LOCK)) --editable '.[$(EXTRAS),release]'
	rm -rf dist
	$(BIN)/python -m hatchling build -d dist
	$(BIN)/python -m twine check --strict dist/*

# Writes down the versions of this environment as the tested ones: without local labels (`+cpu`), which other machines'
# indexes do not know, and without packages that came from a file.
lock: env
	$(BIN)/python -m pip freeze --exclude-editable | grep -vi -e '^\(pip\|setuptools\|wheel\)==' -e ' @ ' | sed 's/+[A-Za-z0-9.]*$$//' > requirements.lock.new
	mv requirements.lock.new requirements.lock
	@touch $(STAMP)

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
