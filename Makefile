# One command each. Every target makes .venv if there is none and installs what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two processes, a test file at a time
PARALLEL := -n 2 --dist loadfile
test: export OMP_NUM_THREADS ?= 1  # more threads than cores would wait for one another

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint docs kernels bench

help:  ## lists the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.installed: setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.developed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

demo: $(VENV)/.installed  ## encodes and decodes a photograph; writes demo.png
	$(BIN)/dyntok demo -o demo.png

test: $(VENV)/.developed  ## runs the ordinary tests; at least 90 % of the lines must run
	$(BIN)/python -m pytest -m "not slow" --cov $(PARALLEL)

test-all: $(VENV)/.developed  ## runs all tests, the slow ones too
	$(BIN)/python -m pytest

lint: $(VENV)/.developed  ## ruff for style, mypy for types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

docs: $(VENV)/.developed  ## builds the documentation in site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

kernels: $(VENV)/.developed  ## compiles the Triton kernels; no GPU is needed
	$(BIN)/python kernels/gate.py

bench: $(VENV)/.developed  ## measures images/s of encode and where the time goes
	$(BIN)/python benchmarks/encode.py
