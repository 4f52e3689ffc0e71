# make demo      train a small SwitchAll language model on this machine (ARGS="--steps 50" passes options on)
# make test      run the tests; on a machine with a GPU the GPU tests too (ARGS="-k gating" passes options on)
# make lint      ruff, formatting, types
# make bench     compare with rivals (ARGS="--only GROUP", or "--full" for all rows)
# make clean     remove environments, builds and caches
#
# demo, test, lint and bench create .venv and install the package into it when needed.

PYTHON ?= python3
JOBS ?= 2
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
INSTALLED := .venv/.installed
DEV := .venv/.installed-dev

.PHONY: demo test lint bench clean

demo: $(INSTALLED)
	$(BIN)/python -m triton_moe demo $(ARGS)

# One thread each: the workers already fill the cores, and the tensors are tiny.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --benchmark-disable $(ARGS)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python -m triton_moe bench $(ARGS)

clean:
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install -c constraints.txt -e '.[test,demo]'
	touch $@

$(DEV): $(INSTALLED)
	$(PIP) install -c constraints.txt -e '.[dev]'
	touch $@
