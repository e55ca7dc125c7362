# Every target sets up what it needs; a machine with Python 3.11 (pip, venv), make and git is enough.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
# Two processes that compute at once share two cores badly unless each keeps to one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: help demo demo-train test test-long soak lint bench clean
help:
	@echo "make demo       serve the embedded model, and finetune it while it serves (minutes)"
	@echo "make demo-train plan, simulate and train a two-tower model on four local ranks (minutes)"
	@echo "make test       the tests (under 10 minutes on 2 cores)"
	@echo "make test-long  the tests that take minutes each"
	@echo "make soak       the long random runs"
	@echo "make lint       ruff, pyright, import-linter"
	@echo "make clean      remove the virtual environment and caches"

# torch first and by its exact version: anything looser may pull gigabytes of CUDA wheels.
$(VENV)/.runtime: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip --disable-pip-version-check install --quiet torch==2.13.0
	$(PIP) -e '.[examples]'
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) -e '.[dev]'
	@touch $@

demo: $(VENV)/.runtime
	$(BIN)/python examples/demo_serve.py
	$(BIN)/python examples/demo_coserve.py

demo-train: $(VENV)/.runtime
	$(BIN)/python examples/train_digits.py

test: $(VENV)/.dev
	$(PYTEST) -n 2 --dist worksteal -m "not long and not soak"

test-long: $(VENV)/.dev
	$(PYTEST) -m long

soak: $(VENV)/.dev
	$(PYTEST) -m soak -s

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache
