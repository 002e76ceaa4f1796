# One command each. Every target makes .venv if there is none and installs what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint docs kernels bench

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.installed: setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.developed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

demo: $(VENV)/.installed  ## a photograph into integers and back; leaves demo.png
	$(BIN)/dyntok demo -o demo.png

test: $(VENV)/.developed  ## the ordinary tests; at least 90 % of the lines must run
	$(BIN)/python -m pytest -m "not slow" --cov

test-all: $(VENV)/.developed  ## the slow ones, too
	$(BIN)/python -m pytest

lint: $(VENV)/.developed  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(VENV)/.developed  ## the documentation, as pages in site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

kernels: $(VENV)/.developed  ## Triton kernels compiled for GPUs that need not be there
	$(BIN)/python kernels/gate.py

bench: $(VENV)/.developed  ## images/s of encode on this machine, and where the time goes
	$(BIN)/python benchmarks/encode.py
