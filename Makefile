# The two commands a new user needs are `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN_ENV := JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.cache/jax \
  JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.5 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=0
WORKERS ?= 2

.PHONY: install demo test test-full test-lowest goldens lint format clean

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --group examples --group dev --group docs \
	  --editable ".[flax,checkpoint,controllers,plot]"
	touch $@

demo: install
	JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(BIN)/python -m examples.demo

test: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright && $(BIN)/lint-imports
	$(RUN_ENV) XLA_FLAGS=--xla_force_host_platform_device_count=8 \
	  $(BIN)/python -m pytest -q -n $(WORKERS) tests/parallel
	$(RUN_ENV) $(BIN)/python -m pytest -q -n $(WORKERS) tests --ignore tests/parallel

clean:
	rm -rf $(VENV) .cache build dist out
