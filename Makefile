# Two commands to know: make demo, make test. Each sets itself up first.
SHELL := /bin/bash
.DEFAULT_GOAL := help
BIN := .venv/bin
# Two processes of one thread each: what a small machine has. make test WORKERS=8 on a larger one.
WORKERS ?= 2
export OMP_NUM_THREADS ?= 1
PYTEST = $(BIN)/python -m pytest tests -n $(WORKERS) --durations=10
# Passed on to pytest: make test-all PART=1/4 ARGS="-m slow"
ARGS ?=

.PHONY: help setup setup-slurm demo test test-all check format bench bench-data bench-optim bench-parallel lock clean

help:  ## this list
	@awk -F ':.*##  *' '/^[a-z-]+:.*##/ {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## make .venv (variables: PYTHON=, TORCH_INDEX= of another torch build); fast when nothing changed
	@PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)" scripts/setup.sh

setup-slurm:  ## install Slurm on Debian or Ubuntu (as root), for the tests that start a cluster of their own
	@scripts/setup_slurm.sh

demo: setup  ## train a small Hope, stop, resume, measure, sample, draw: about 6 minutes
	@env -u OMP_NUM_THREADS $(BIN)/python -m scripts.demo

test: check  ## format, lint, types and the fast tests
	$(PYTEST) -m "not slow" $(ARGS)

test-all: setup  ## the whole suite, slow tests too; PART=i/n runs one of n equal parts
	$(PYTEST) $(if $(PART),--part $(PART)) --durations=25 $(ARGS)

check: setup  ## format, lint and types alone
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy hope_train launch data_pipelines
	$(BIN)/python -m scripts.config_docs --check

format: setup  ## rewrite the code in the project's format, and docs/configuration.md from the fields
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .
	$(BIN)/python -m scripts.config_docs

bench: setup  ## speed and memory against the Transformer++ twin, one JSON line per row
	@$(BIN)/python -m scripts.bench

bench-optim: setup  ## step time and state of every update rule, one JSON line per row
	@$(BIN)/python -m scripts.bench_optim

bench-parallel: setup  ## what parallelism and sharded checkpoints cost, one JSON line per row
	@$(BIN)/python -m scripts.bench_parallel

bench-data: setup  ## speed and memory of the data pipeline (CORPUS=a file or folder), one JSON line per row
	@$(BIN)/python -m scripts.bench_data $(if $(CORPUS),--corpus $(CORPUS))

lock:  ## write constraints.txt anew from what pyproject.toml allows (rarely)
	scripts/lock.sh

clean:  ## remove caches and build output; .venv and runs/ stay
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
