# One environment, .venv at the root, shared by every target. A stamp inside it says what is installed, so a repeated
# call starts at once and a changed pyproject.toml installs again.

PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
# Catalogue names, local-dir:FOLDER or hf-hub:ORGANISATION/NAME; empty serves the bundled models.
MODELS ?=
# Passed on to pytest: make test PYTEST_ARGS="-m 'not slow'"
PYTEST_ARGS ?=
# A test uses one thread, so a worker per core. All tests of a file stay together, for they share what is costly to make.
PYTEST_WORKERS ?= auto
# What `make bench` serves: a plain network costs as much as one path of a random gated one.
BENCHMARK_MODEL ?= standard-resnet20-cifar10

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
# The exact versions of pyproject.toml, read from it so that they stand in one place.
TORCH = $(shell grep -oE 'torch(vision)?==[0-9.]+' pyproject.toml)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help serve demo test quick check format bench clean

help: ## say what each target does
	@grep -hE '^[a-z]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sort | sed -E 's/:[^#]*## /\t/' | expand -t 10

serve: $(VENV)/installed-serve ## serve the bundled models at 127.0.0.1:8000, without torch (MODELS=, HOST=, PORT=)
	$(BIN)/manygates serve $(MODELS) --host $(HOST) --port $(PORT)

demo: $(VENV)/installed-demo ## serve the bundled models with the interactive demo
	$(BIN)/manygates demo $(MODELS)

test: check ## everything that must hold: format, lint, types, import contracts, tests
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

quick: $(VENV)/installed-dev ## the tests without a process, server, training run or browser
	$(BIN)/python -m pytest --quick -n $(PYTEST_WORKERS) --dist worksteal $(PYTEST_ARGS)

check: $(VENV)/installed-dev ## format, lint, types and import contracts, without the tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/installed-dev ## rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/installed-dev ## measure the speed of training and of serving (BENCHMARK_MODEL=)
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/serving.py $(BENCHMARK_MODEL)

clean: ## remove .venv, caches and built distributions; training runs stay
	rm -rf $(VENV) dist build .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find manygates zoo training serving tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# pip 25.1 was the first to install dependency groups, and a new environment brings the pip of its Python.
$(VENV)/installed-pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "manygates needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version 2>&1);" \
		"name another: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade 'pip>=25.1'
	@touch $@

$(VENV)/installed-serve: $(VENV)/installed-pip pyproject.toml
	@echo "installing what serving needs into $(VENV)"
	$(PIP) install --quiet --editable '.[serve]'
	@touch $@

# torch and torchvision first and together, so that their build (CPU or CUDA) is chosen once, by pip's settings alone;
# what follows finds the pinned versions there and leaves them as they are.
$(VENV)/installed-demo: $(VENV)/installed-pip pyproject.toml
	@echo "installing what training and the demo need into $(VENV); torch is large"
	$(PIP) install --quiet $(TORCH)
	$(PIP) install --quiet --editable '.[demo]'
	@touch $(VENV)/installed-serve $@

$(VENV)/installed-dev: $(VENV)/installed-demo
	$(PIP) install --quiet --editable '.[demo,autoattack,report]' --group dev
	@touch $@
