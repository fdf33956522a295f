# SPDX-License-Identifier: Apache-2.0
# Variables:  PYTHON=python3.12       the Python to make .venv with (3.10 or newer)
#             TORCH=torch==2.13.0     what to install as torch, unless $(PYTHON) already imports torch >= 2.11
#             TORCH_INDEX=<url>       where to take it from, such as the CPU index that pytorch.org names
#             LRK_CUDA=AUTO|ON|OFF, LRK_CUDA_ARCHS="80-real;90-real", MAX_JOBS=2     see setup.py
#             ARGS="..."              passed on to the demo, pytest or the benchmark
PYTHON ?= python3
ifneq ($(origin TORCH),undefined)
export TORCH_GIVEN := yes
endif
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
export PYTHON TORCH TORCH_INDEX

SETUP := tools/setup.sh
PY := .venv/bin/python
TEST := $(PY) -m pytest -n 2 --dist worksteal
EMULATE := $(PY) tests/emulator/build.py
CFILES := find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh'

.DEFAULT_GOAL := help
.PHONY: help setup build demo test test-quick test-full bench peers gpu wheel lint format static abi clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 22
	@sed -n '2,7s/^#//p' Makefile

setup: ## .venv with torch, everything that demo, tests and tools need, and lrkern built in place
	@$(SETUP) demo test dev

build: ## compile what changed
	@$(SETUP)

demo: ## fine-tune a real model with lrkern beside stock PEFT (ARGS=--quick: under two minutes)
	@$(SETUP) demo
	@$(PY) examples/demo.py $(ARGS)

test: ## all tests
	@$(SETUP) demo test peers
	@$(EMULATE) all
	@$(TEST) $(ARGS)

test-quick: ## all but the slow ones
	@$(SETUP) demo test peers
	@$(EMULATE) extension
	@$(TEST) -m "not slow" $(ARGS)

test-full: ## and layers of all sizes, 2,229 cases of multi-LoRA's grid for 296, longer fuzzing, opcheck of all dtypes (CONTRIBUTING.md)
	@$(SETUP) demo test peers
	@$(EMULATE) all
	@LRK_TEST_FULL=1 $(TEST) $(ARGS)

bench: ## measure (ARGS="lora --help" for shapes and baselines)
	@$(SETUP) demo
	@$(PY) bench/run.py $(or $(ARGS),lora)

peers: ## other people's kernels for tests and bench, into .venv/peers
	@$(SETUP) demo peers peers_vllm

gpu: ## on a machine with a GPU: tests, sanitizer, benchmarks; evidence in out/gpu (ARGS="--only lora", --tune)
	@$(SETUP) demo test
	@$(PY) tools/gpu.py --out out/gpu $(ARGS)

wheel: ## dist/lrkern-*-py3-none-*.whl for all CUDA architectures, tried in fresh environments
	@$(SETUP) dev
	@$(PY) tools/smoke_wheel.py $(ARGS)

lint: ## ruff, clang-format and the layer rules, as pre-commit runs them
	@$(SETUP) test dev
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@$(CFILES) | xargs .venv/bin/clang-format --dry-run -Werror
	@$(PY) -m pytest tests/test_layers.py

format: ## rewrite sources as lint wants them
	@$(SETUP) dev
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .
	@$(CFILES) | xargs .venv/bin/clang-format -i

static: ## every .cu for each architecture, its registers, spills, instructions and occupancy against the plan
	@$(SETUP) dev
	@$(PY) tools/static_checks.py $(ARGS)

abi: ## _C.so asks for nothing but the stable ABI of torch 2.11
	@$(SETUP) dev
	@$(PY) tools/abi_gate.py

clean: ## build products; .venv stays
	rm -rf build dist python/*.egg-info python/lrkern/*.so
