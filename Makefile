# Two commands do everything, set-up included:  make demo   make test
# `make check` is what must be green before a change lands; `.ci/run` runs it, the slow tests and the demo.

SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV := .venv
BIN := $(VENV)/bin
# The first Python of at least 3.11 that really runs; a version manager's shim may exist without a version behind it.
PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
export PATH := $(CURDIR)/$(BIN):$(PATH)
export OMP_NUM_THREADS ?= 2

.PHONY: help demo test test-slow test-lips test-lmms test-all lint types check bench clean

help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and was not found"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[demo]"
	@touch $@

$(VENV)/dev.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[demo,dev,decord,audio,deepspeed]"
	@touch $@ $(VENV)/demo.stamp

## make demo       train and evaluate an elastic model on the built-in world: table, plot and checkpoint in runs/demo
demo: $(VENV)/demo.stamp
	$(BIN)/python -m mllm demo --out runs/demo

## make test       the fast tests
test: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2

## make test-slow  the tests that take minutes (several processes, DeepSpeed)
test-slow: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

$(VENV)-lips/stamp: pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed and was not found"; exit 1; }
	$(PYTHON) -m venv $(VENV)-lips
	$(VENV)-lips/bin/python -m pip install --quiet --editable ".[lips,demo,dev]"
	@touch $@

## make test-lips  the tests that need MediaPipe, in an environment of their own: it holds other libraries back
test-lips: $(VENV)-lips/stamp
	OMP_NUM_THREADS=1 $(VENV)-lips/bin/python -m pytest tests/preparation

$(VENV)-lmms/stamp: pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and was not found"; exit 1; }
	$(PYTHON) -m venv $(VENV)-lmms
	$(VENV)-lmms/bin/python -m pip install --quiet --editable ".[lmms,dev]"
	@touch $@

## make test-lmms  the tests that need lmms-eval, in an environment of their own: it brings a hundred packages
test-lmms: $(VENV)-lmms/stamp
	OMP_NUM_THREADS=1 $(VENV)-lmms/bin/python -m pytest tests/lmms

test-all: test test-slow test-lips test-lmms

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.stamp
	$(BIN)/pyright

## make check      ruff, pyright and the fast tests
check: lint types test

## make bench      every benchmark, and one table of what they found beside their goals in runs/bench: 20 idle minutes
bench: $(VENV)/dev.stamp
	$(BIN)/python benchmarks/all_goals.py

## make clean      remove the environment and what the tools left
clean:
	rm -rf $(VENV) $(VENV)-lips $(VENV)-lmms build *.egg-info .pytest_cache .ruff_cache
