# Two commands on a fresh machine with Python ≥ 3.11:  make demo   make test     (make test-all: what CONTRIBUTING.md says)
PYTHON ?= python3
BIN := .venv/bin

OLDEST := tests/hub/test_quantizer.py tests/hub/test_checkpoint.py tests/decoding/test_decode.py tests/decoding/test_steps.py

.PHONY: demo test test-all clean

demo: .venv/demo
	$(BIN)/rankgate demo -o report

test: .venv/test .venv/oldest
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest -n 2 -m "not real and not slow"
	$(BIN)/python -m pytest -m real
	PYTHONPATH=.venv/oldest $(BIN)/python -m pytest -n 2 $(OLDEST)

test-all: test
	$(BIN)/python -m pytest -m slow

# torch first, by its exact version: where a CPU build of it is at hand, pip takes that one
.venv/demo: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Rankgate needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/test: .venv/demo
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,datasets]'
	touch $@

# the oldest transformers that is supported, before the newest on the path
.venv/oldest: .venv/demo
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade --target $@ transformers==5.17.0 $$(grep '^numpy==' constraints.txt)
	touch $@

clean:
	rm -rf .venv report build *.egg-info
