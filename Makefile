# The chores of this repository: `make` lists them. Each sets up what it needs by itself.

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && { echo "$$p"; break; }; done)
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
READY := $(VENV)/.ready
COMPILED := $(VENV)/.compiled

.DEFAULT_GOAL := help
.PHONY: help setup demo audit test fuzz deps golden soak matrix lint format types docs bench study clean

help: ## list the chores
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-7s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(READY) $(COMPILED) ## make the virtual environment (the others do it when needed)

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: Python 3.11, 3.12 or 3.13 is needed; name it with make PYTHON=..." >&2; exit 2; }
	@echo "setting up $(VENV) (some minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(COMPILED): $(READY)
	@echo "compiling kernels"
	@cd tests && PYTHONPATH=../src:. $(BIN)/python -m support.compiled || echo "make: the tests will tell why" >&2
	@touch $@

demo: $(READY) ## run a federated job on a real model (3 minutes)
	@PATH="$(BIN):$$PATH" examples/quickstart/run.sh

audit: $(READY) ## hold what `make demo` left behind against its policy
	@PATH="$(BIN):$$PATH" examples/quickstart/audit.sh

test: $(COMPILED) ## run the tests; choose with ARGS="-k merge"
	@$(BIN)/python -m pytest -q -n auto --dist worksteal $(ARGS)

fuzz: $(READY) ## damage files and count how commands end; ARGS="--seconds 600 --seed 1"
	@cd tests && PYTHONPATH=../src:. $(BIN)/python -m attacks.fuzz --save ../fuzz-faults $(ARGS)

deps: ## look up known holes in the pinned dependencies (needs a network)
	@PYTHON=$(PYTHON) .ci/deps

soak: matrix ## run all that is run before a release: the matrix, and tests that take minutes or much disk
	@$(BIN)/python -m pytest -q -m soak --hypothesis-profile soak $(ARGS) || test $$? = 5 # 5: there are none

golden: $(READY) ## compare all outputs with the golden corpus; ARGS="--write" records them anew
	@cd tests && PYTHONPATH=../src $(BIN)/python -m golden.corpus $(ARGS)

matrix: $(READY) ## run the tests as on other machines: instruction sets, cores, locale, umask (40 minutes)
	@tests/matrix.sh $(BIN)/python

lint: $(READY) ## check style and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet . || { echo "not formatted: run 'make format'" >&2; exit 1; }

format: $(READY) ## format the code and sort imports
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .

types: $(READY) ## check types, strictly
	@$(BIN)/mypy

docs: $(READY) ## write docs/commands/ from the commands' own help
	@$(BIN)/python docs/generate.py

bench: $(READY) ## measure speed and memory; choose with ARGS
	@$(BIN)/python -m benchmarks $(ARGS)

study: $(READY) ## measure what hiding costs and buys (hours; goes on where it was); choose with ARGS
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		-r examples/quickstart/requirements.txt -r benchmarks/study/requirements.txt
	@$(BIN)/python -m benchmarks.study $(ARGS)

clean: ## remove the virtual environments and all caches
	@rm -rf $(VENV) .venv-deps build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
