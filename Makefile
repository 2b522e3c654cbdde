# The two commands a new user needs are `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2

# Tests run on the CPU, with one compilation cache for all workers and runs.
TEST_ENV := JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.cache/jax \
  JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.3
# Eight devices on two busy cores may wait for each other longer than XLA's patience of 40 seconds.
EIGHT_DEVICES := XLA_FLAGS="--xla_force_host_platform_device_count=8 \
  --xla_cpu_collective_call_warn_stuck_timeout_seconds=120 \
  --xla_cpu_collective_call_terminate_timeout_seconds=600"

.PHONY: install demo test test-full test-lowest goldens contract notebooks lint format clean

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --group examples --group dev --group docs \
	  --editable ".[flax,checkpoint,controllers,plot]"
	touch $@

demo: install
	JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(BIN)/python -m examples.demo

test: install lint
	$(TEST_ENV) $(EIGHT_DEVICES) $(BIN)/python -m pytest -q -n $(WORKERS) -m "not slow" tests/parallel
	$(TEST_ENV) $(BIN)/python -m pytest -q -n $(WORKERS) -m "not slow" tests --ignore tests/parallel

# The long forms too: more kills, more drawn cases, every notebook, full examples.
test-full: install lint
	$(TEST_ENV) $(EIGHT_DEVICES) $(BIN)/python -m pytest -q -n $(WORKERS) tests/parallel
	$(TEST_ENV) $(BIN)/python -m pytest -q -n $(WORKERS) tests --ignore tests/parallel

# The lower bounds of pyproject.toml, in an environment of their own.
test-lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	.venv-lowest/bin/python -m pip install --quiet --group examples --group dev --group docs \
	  --constraint tests/lowest.txt --editable ".[flax,checkpoint,controllers,plot]"
	$(TEST_ENV) .venv-lowest/bin/python -m pytest -q -n $(WORKERS) -m "not slow" \
	  tests/unit tests/contract tests/goldens

goldens: install
	$(TEST_ENV) $(BIN)/python -m tests.goldens

contract: install
	$(TEST_ENV) $(BIN)/python -m tests.contract

# Executes every notebook from its .py source and keeps the outputs.
notebooks: install
	JAX_PLATFORMS=cpu $(BIN)/python notebooks/execute.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-lowest .cache build dist out
