# make setup   creates .venv with what serving needs
# make up      sets up and serves:  make up ARGS="--model Qwen/Qwen3-0.6B --decode 2"
# make test    sets up and passes the tests (all of .ci/run)
# make check   the quick half: format, lint, types, tests without services
# make test-families  every model family against transformers, in minutes; writes docs/models.md
# make test-gpu  what is for a GPU; without one, kernels run in Triton's interpreter and are compiled for some GPUs
# make compose-test  the containers, end to end; needs docker
# PIP_ARGS     more arguments for pip, such as an index that has torch's CPU build

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c requirements.lock

.PHONY: setup up test test-families test-gpu check lint compose-test

setup: .venv/.done

.venv/.done: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "pdserve needs Python 3.11 or later: make setup PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	@echo "installing torch, transformers and a few more: a minute or two, and longer where torch comes with CUDA"
	$(PIP) -e .
	@$(BIN)/python -m shared.engine.native
	@touch $@

# What tests and linters need besides.
.venv/.dev: .venv/.done
	$(PIP) -e '.[dev]'
	@touch $@

up: setup
	@exec $(BIN)/pdserve up $(ARGS)

lint: .venv/.dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

check: lint
	$(BIN)/pytest -q -m 'not services'

compose-test:
	tests/compose/run

test: lint
	$(BIN)/pytest -q

test-families: .venv/.dev
	$(BIN)/pytest -q --write-docs tests/families

# Triton comes with torch's CUDA build. Where it has not, it gets a folder of its own, which nothing else looks into.
.venv/.triton: .venv/.dev
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) --no-deps --upgrade --target .venv/triton triton==3.9.0
	@touch $@

test-gpu: .venv/.triton
	PYTHONPATH=.venv/triton $(BIN)/pytest -q tests/gpu
