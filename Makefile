# make quickstart: all stages on the embedded target.   make test: the test suite.   make test-fast: its fast tests.
# All three install the locked versions into .venv. PYTHON selects the interpreter (3.11 to 3.13).
# make test-newest, make test-lowest: the test suite with the newest releases and with the lowest versions allowed by
# pyproject.toml, each in a separate environment.   make lock: update requirements/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOCKED := requirements/locked.txt
LOWEST := requirements/lowest.txt
LINTED := src scripts tests examples setup.py
COMPILE := $(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --quiet --upgrade \
	--constraint requirements/pins.txt --custom-compile-command 'make lock'

.PHONY: quickstart test test-fast test-newest test-lowest lint lock clean

quickstart: $(VENV)/.ready
	$(BIN)/python -m train +experiment=tiny

test: $(VENV)/.ready
	$(BIN)/python -m pytest

test-fast: $(VENV)/.ready
	$(BIN)/python -m pytest -m "not slow" --dist worksteal

lint: $(VENV)/.ready
	$(BIN)/ruff check $(LINTED)
	$(BIN)/ruff format --check $(LINTED)
	$(BIN)/mypy

# torch comes before deepspeed, whose build imports it. Without build isolation, the build tools are locked as well.
define install
	$(PYTHON) -c "import sys; sys.exit(f'Python 3.11 to 3.13 is needed, found {sys.version}') if not (3, 11) <= sys.version_info < (3, 14) else None"
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet $(2) setuptools
	$(1)/bin/python -m pip install --quiet $(2) torch
	$(1)/bin/python -m pip install --quiet $(2) --no-build-isolation --editable ".[test]"
endef

$(VENV)/.ready: pyproject.toml $(LOCKED)
	$(call install,$(VENV),--constraint $(LOCKED))
	touch $@

.venv-lowest/.ready: pyproject.toml $(LOWEST)
	$(call install,.venv-lowest,--constraint $(LOWEST))
	touch $@

test-lowest: .venv-lowest/.ready
	.venv-lowest/bin/python -m pytest

# Upgraded at every call, because the newest versions change over time.
test-newest:
	$(call install,.venv-newest,--upgrade --upgrade-strategy eager)
	.venv-newest/bin/python -m pip list
	.venv-newest/bin/python -m pytest

lock: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet uv
	$(COMPILE) --output-file $(LOCKED)
	$(COMPILE) --resolution lowest-direct --output-file $(LOWEST)

clean:
	rm -rf .venv .venv-newest .venv-lowest
