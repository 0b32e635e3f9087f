# What a newcomer needs: python3 (>= 3.11) and make. Every target sets up .venv first; a second run installs nothing.
#   make demo    the main job on real data, ends with a table and the path of report.html
#   make test    the tests, without tests/faults; `make -j 2 test-ranks test-alone` are the same in two halves side by side
#   make faults  tests/faults: a fifth of the campaign below, picked by the commit or by JANUS_FAULT_SEED=0 (to 4)
#   make test-faults  crashes, power losses, kills, damage, failing disks and ranks: the whole campaign (ten minutes)
#   make fuzz    ten thousand damaged tars, members and pictures through every reader (a minute)
#   make check   format, lint, import contracts, types, size budgets
# `make test faults` is every test once, as is `pytest` without arguments.
# A smaller torch without CUDA: make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
TORCH_INDEX ?=
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
pinned = $(shell sed -n 's/^$(1)==/$(1)==/p' constraints.txt)

# The stamp's name holds a checksum of what it was installed from: other pins mean another stamp.
STAMP := $(VENV)/installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)

.PHONY: setup demo test test-ranks test-alone faults test-faults fuzz check clean
setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "janus_mega needs Python 3.11 or newer; name one with: make PYTHON=python3.12"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing build tools and torch"
	@$(PIP) $(call pinned,setuptools) $(call pinned,hatchling) $(call pinned,editables)
	@$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(call pinned,torch)
	@echo "installing DeepSpeed (built without its C++ operators: no compiler is needed)"
	@DS_BUILD_OPS=0 $(PIP) --no-build-isolation $(call pinned,deepspeed)
	@echo "installing the rest"
	@$(PIP) --no-build-isolation --editable '.[dev,demo]'
	@rm -f $(VENV)/installed-*
	@touch $@

demo: $(STAMP)
	$(BIN)/janus-mega demo

test: $(STAMP)
	$(BIN)/python -m pytest --ignore tests/faults $(PYTEST_ARGS)

test-ranks: $(STAMP)
	$(BIN)/python -m pytest --ignore tests/faults -m dist $(PYTEST_ARGS)

test-alone: $(STAMP)
	$(BIN)/python -m pytest --ignore tests/faults -m 'not dist' $(PYTEST_ARGS)

faults: $(STAMP)
	$(BIN)/python -m pytest tests/faults $(PYTEST_ARGS)

test-faults: $(STAMP)
	JANUS_FAULTS=all $(BIN)/python -m pytest --durations 15 tests/faults $(PYTEST_ARGS)

fuzz: $(STAMP)
	JANUS_FUZZ_CASES=10000 $(BIN)/python -m pytest -q tests/data/test_fuzz.py

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_budgets.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
