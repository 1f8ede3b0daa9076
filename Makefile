# `make demo` and `make test` need Python 3.11 or newer and make; each makes the virtual environment by itself, once.
# After that nothing here uses the network, unless pyproject.toml or constraints.txt changed.

# the first of these that is new enough; `make PYTHON=/path/to/python` to say another
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN_DIR ?= runs/demo
# more arguments for pytest, as in `make test PYTEST_ARGS="-k plan -x"`
PYTEST_ARGS ?=
# tests run side by side, one for each processor, at most four, a thread each; `-n 0` in PYTEST_ARGS for one at a time
SIDE_BY_SIDE := -n logical --maxprocesses 4
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow check format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

# The build tool is installed first and used without isolation, so that a later change of pyproject.toml that needs no new
# package is installed without the network too. The stamp is written last: an interrupted installation is done again.
$(STAMP): pyproject.toml constraints.txt
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "daqconvert needs Python 3.11 or newer, found '$(PYTHON)'. Try: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	'$(PYTHON)' -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt setuptools
	$(PIP) install --no-build-isolation -c constraints.txt -e '.[all,dev]'
	@touch $@

demo: $(STAMP)  ## the main job: digits, a small network, W4A4, ONNX; results in runs/demo
	$(BIN)/daqconvert finetune --out $(RUN_DIR) --overwrite

test: check  ## lint, types and all fast tests
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(PYTEST_ARGS)

test-slow: $(STAMP)  ## the tests marked slow, which `make test` leaves out
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

check: $(STAMP)  ## ruff (lint and format) and mypy, changing nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP)  ## let ruff rewrite the files
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove the virtual environment, caches and runs/demo
	rm -rf $(VENV) runs/demo build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
