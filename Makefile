# Every target keeps its environment in .venv, and makes it when it is absent.

PY := .venv/bin/python
# The lock was made on Python 3.11; any later one serves where 3.11 is missing.
BASE_PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
# A process for each core; a module's tests stay together, since they share what is expensive to make.
PYTEST_ARGS ?= -n auto --maxprocesses 8 --dist loadscope
LOCKED := .venv/.stamp-locked
READY := .venv/.stamp-ready
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help demo test check docs format env clean

help:  ## what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */  make \1\t/'

demo: $(READY)  ## draw the pictures of the demo into outputs/demo
	$(OFFLINE) $(PY) -m controlroom.app.demo

test: $(READY)  ## run every test
	$(OFFLINE) OMP_NUM_THREADS=1 $(PY) -m pytest -q $(PYTEST_ARGS)

check: $(READY)  ## lint, format, types, generated docs, snippets of the docs
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --warnings
	$(PY) -m controlroom.app.docs --check
	$(OFFLINE) OMP_NUM_THREADS=1 $(PY) tools/check_snippets.py README.md docs

docs: $(READY)  ## write the generated pages of docs/
	$(PY) -m controlroom.app.docs

format: $(READY)  ## let ruff format and fix what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

env: $(READY)  ## only make the environment

clean:  ## remove caches and outputs; the environment stays
	rm -rf outputs build dist .pytest_cache .ruff_cache .hypothesis
	find src tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and alone, by its plain version: that takes the CPU build where one lies on the machine.
$(LOCKED): requirements/lock.txt
	@test -n "$(BASE_PYTHON)" || { echo "controlroom needs Python 3.11 or newer; none was found. Set BASE_PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "making the environment in .venv (about a minute, 1.5 GB)"
	@$(PY) -m pip --version >/dev/null 2>&1 || $(BASE_PYTHON) -m venv --clear .venv
	$(PY) -m pip install --quiet "$$(grep '^torch==' requirements/lock.txt)"
	$(PY) -m pip install --quiet -r requirements/lock.txt
	@touch $@

$(READY): $(LOCKED) pyproject.toml
	$(PY) -m pip install --quiet --no-deps -e .
	@touch $@
