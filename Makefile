# Each target sets up what it needs by itself. PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TEST_READY := $(VENV)/.ready-test
WORKERS ?= 2

.PHONY: demo test check format test-slow test-lowest test-gpu sanitize bench docs clean help

help:
	@echo "make demo       train the demo ladder on real text and write runs/demo/report.html"
	@echo "make test       environment, format, lint, types, tests"
	@echo "make check      the same without setting up"
	@echo "make test-slow  what does not fit in 'make test'"
	@echo "make test-lowest   the tests with the oldest allowed dependencies"
	@echo "make test-gpu   tests that need a CUDA device"
	@echo "make sanitize   every kernel under NVIDIA's compute-sanitizer, on a CUDA device"
	@echo "make bench NAME=x   run benchmarks/x.py"
	@echo "make docs       build the documentation and check its links"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The demo needs the package alone; the tests need their tools beside it.
$(READY): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	@touch $@

$(TEST_READY): $(READY)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	@touch $@

demo: $(READY)
	$(BIN)/fathom ladder demo --out runs/demo

test: $(TEST_READY)
	@$(MAKE) --no-print-directory check

check:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/pytest -m "not gpu and not slow" -n $(WORKERS)

format: $(TEST_READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test-slow: $(TEST_READY)
	$(BIN)/pytest -m "slow and not gpu"

# The oldest allowed version of every direct dependency, without the peers that tests compare with.
test-lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install -q -c constraints-lowest.txt -e '.[data]' \
		pytest pytest-xdist pytest-timeout hypothesis
	.venv-lowest/bin/python -m pytest -m "not gpu and not slow" -n $(WORKERS)

# Uses the machine's own torch, a CUDA build: python3 with the test tools installed.
test-gpu:
	$(PYTHON) -m pytest -m gpu

# A first run without a tool compiles the kernels.
sanitize:
	PYTHONPATH=src $(PYTHON) tests/ops/sanitize.py
	for tool in memcheck racecheck initcheck synccheck; do \
		PYTHONPATH=src compute-sanitizer --tool $$tool --error-exitcode 1 \
			$(PYTHON) tests/ops/sanitize.py || exit 1; \
	done

bench: $(READY)
	$(BIN)/python benchmarks/$(NAME).py

docs: $(TEST_READY)
	$(BIN)/python docs/build.py

clean:
	rm -rf $(VENV) runs dist site
