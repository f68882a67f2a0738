# Every target builds the environment that it needs, from pip and an exact list of versions, and
# needs nothing but Python 3.11 and make. A built environment is kept until pyproject.toml or its
# list changes.
#
#   make demo           the main job: digits and eight schools, both backends (ARGS=... for options)
#   make test           tests, doctests and the examples' smoke runs, both backends
#   make lint           ruff (check and format) and mypy
#   make docs           HTML pages under docs/_build/html; warnings are errors
#   make bench          benchmarks: one JSON and docs/benchmark_results.md (ARGS="--quick": minutes)
#   make wheel          the wheel, under dist/
#   make test-numpyro PYTHON=python3.12     the NumPyro half alone: no torch, ArviZ 1.x
#                       (ARGS=--cases=2: two cases of every test function, in half the time)
#   make clean          remove what the targets made, environments included

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3.11
JOBS ?= 2
ARGS ?=

# The interpreter itself, found behind pyenv's shims too; empty, with a message, if none runs.
INTERPRETER := $(shell .ci/find-python $(PYTHON))
VERSION := $(shell test -z "$(INTERPRETER)" || "$(INTERPRETER)" -c 'import sys; print("%d.%d" % sys.version_info[:2])')

VENV := .venv
BIN := $(VENV)/bin
NUMPYRO_VENV := .venv-numpyro-$(VERSION)
NUMPYRO_BIN := $(NUMPYRO_VENV)/bin
NUMPYRO_CONSTRAINTS := constraints/$(if $(filter 3.11,$(VERSION)),py311,py312-numpyro).txt

# One thread in each of the JOBS processes: more of them only get in one another's way.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 \
  XLA_FLAGS="--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

# install(environment, constraints, extras): the environment is made anew only if its Python does
# not start. The build backend goes in first, so that its version too is the listed one.
define install
test -n "$(VERSION)" || { echo "Expected PYTHON to run; got '$(PYTHON)'." >&2; exit 1; }
$(1)/bin/python -c 'import pip' 2>/dev/null || $(INTERPRETER) -m venv --clear $(1)
$(1)/bin/python -m pip install --quiet --constraint $(2) hatchling editables
$(1)/bin/python -m pip install --quiet --constraint $(2) --no-build-isolation --editable '.[$(3)]'
touch $(1)/.installed
endef

.PHONY: help demo test lint docs bench wheel test-numpyro format clean

help:
	@sed -n 's/^#   //p' Makefile

$(VENV)/.installed: pyproject.toml constraints/py311.txt
	@test "$(VERSION)" = 3.11 || { echo "Expected Python 3.11, for which constraints/py311.txt holds;" \
	  "got '$(PYTHON)', version '$(VERSION)'." >&2; exit 1; }
	@echo "Building $(VENV) (a few minutes the first time) ..."
	@$(call install,$(VENV),constraints/py311.txt,all)

$(NUMPYRO_VENV)/.installed: pyproject.toml $(NUMPYRO_CONSTRAINTS)
	@echo "Building $(NUMPYRO_VENV) ..."
	@$(call install,$(NUMPYRO_VENV),$(NUMPYRO_CONSTRAINTS),numpyro$(comma)examples$(comma)test)

comma := ,

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py $(ARGS)

test: $(VENV)/.installed
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests $(ARGS)
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --doctest-modules pyro_vae_ext numpyro_vae_ext

# No torch here: what needs it is left out by tests/conftest.py.
test-numpyro: $(NUMPYRO_VENV)/.installed
	@! $(NUMPYRO_BIN)/python -c 'import torch' 2>/dev/null || { echo "Expected no torch in $(NUMPYRO_VENV)." >&2; exit 1; }
	$(ONE_THREAD) $(NUMPYRO_BIN)/python -m pytest -n $(JOBS) --dist worksteal tests $(ARGS)
	$(ONE_THREAD) $(NUMPYRO_BIN)/python -m pytest -n $(JOBS) --dist worksteal --doctest-modules numpyro_vae_ext

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/run.py $(ARGS)

wheel: $(VENV)/.installed
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf .venv .venv-numpyro-* dist docs/_build docs/api/generated .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
