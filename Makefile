# make quickstart: the whole pipeline on the embedded target.   make test: the test suite.
# Both set up what they need in .venv. PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: quickstart test lint clean

quickstart: $(READY)
	$(BIN)/python -m train +experiment=tiny

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check src scripts tests
	$(BIN)/ruff format --check src scripts tests

# torch is named first and pinned: resolved among the others, a newer build for GPUs may come instead of this one.
$(READY): pyproject.toml
	$(PYTHON) -c "import sys; sys.exit('Python 3.11 or newer is needed, found ' + sys.version) if sys.version_info < (3, 11) else None"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $(READY)

clean:
	rm -rf $(VENV)
