# Every target sets up what it needs first. Nothing is installed outside .venv and .compat.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo check test style lint compat lock wheel docs notebook setup clean

setup: $(VENV)/.installed

# What the package itself needs, by the versions of constraints.txt.
$(VENV)/.core: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable ".[pinned]"
	touch $@

# What developing it needs.
$(VENV)/.installed: $(VENV)/.core
	$(PIP) --editable ".[dev]"
	touch $@

demo: $(VENV)/.core
	$(BIN)/thoughtformer demo

# What a developer runs all day: under two minutes on two idle cores.
check: style
	$(BIN)/python -m pytest --numprocesses auto -m "not slow" tests/unit tests/contract tests/parity/test_generation.py

# Everything, the slow tests among it; then a part of it again, with the shapes of all tensors checked (tests/conftest.py).
test: setup
	$(BIN)/python -m pytest --numprocesses auto
	CHECK_SHAPES=1 $(BIN)/python -m pytest --numprocesses auto -m "not slow" tests/parity tests/contract

style: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# Types take most of a minute.
lint: style
	$(BIN)/pyright --pythonpath $(BIN)/python

# The contract at both ends of the ranges in pyproject.toml, warnings as errors.
compat:
	$(PYTHON) .ci/compat.py

# All versions of an environment that pip chooses anew within the ranges; run the tests before you commit it.
lock:
	$(PYTHON) .ci/lock.py

# Built, installed alone into an empty environment, and tried.
wheel:
	$(PYTHON) .ci/wheel.py

# The documentation as a site, in site/; a link that leads nowhere is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# The notebook, as it stands: its answers are thrown away.
notebook: setup
	TQDM_DISABLE=1 $(BIN)/jupyter execute --output=$$(mktemp -d)/run examples/quickstart.ipynb

clean:
	rm -rf site $(VENV) .compat .pytest_cache .ruff_cache .hypothesis
