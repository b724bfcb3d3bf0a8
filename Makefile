# Two commands do everything on a fresh machine: `make serve` and `make test`.
PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DICTIONARY := build/dictionary
RUNS := runs
CONTAINER ?= docker
VARIANT ?= cpu
BUILD_ARGS ?=
IMAGE_TAG = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)$(if $(filter cuda,$(VARIANT)),-cuda)

.DEFAULT_GOAL := help
.PHONY: help venv serve test check format demo demo-depth image image-check deploy-check peers clean

help:  ## Show what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

venv: $(STAMP)  ## Create .venv with everything in it

$(STAMP): pyproject.toml constraints.txt clients/pyproject.toml
	@echo "momaserve: installing into $(VENV) (a few minutes the first time)"
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[dev]' --editable clients
	@touch $@

serve: $(STAMP)  ## Serve the embedded demo on http://$(HOST):$(PORT)
	@echo "momaserve: serving the demo on http://$(HOST):$(PORT) (Ctrl-C stops it)"
	$(BIN)/momaserve serve --host $(HOST) --port $(PORT)

test: $(STAMP)  ## Run all tests
	@echo "momaserve: running the tests"
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(STAMP)  ## Formatting, lint, types, house rules
	@echo "momaserve: checking format, lint, types and house rules"
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy momaserve server/momaserve_server clients/momaserve_client \
		benchmarks/momaserve_bench tests
	$(BIN)/python -m tests.house_rules

format: $(STAMP)  ## Format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

demo: $(STAMP)  ## Train the demo checkpoint from scratch into runs/demo (about 12 hours on one core)
	$(BIN)/momaserve train-image-tokenizer --data $(DICTIONARY) --out $(RUNS)/codes
	$(BIN)/momaserve train --data $(DICTIONARY) --image-tokenizer $(RUNS)/codes --out $(RUNS)/demo-1
	$(BIN)/momaserve train --init $(RUNS)/demo-1 --skip-steps 14000 --recipe demo-second \
		--data $(DICTIONARY) --image-tokenizer $(RUNS)/codes --out $(RUNS)/demo-2
	$(BIN)/momaserve train --init $(RUNS)/demo-2 --skip-steps 28000 --recipe demo-third \
		--data $(DICTIONARY) --image-tokenizer $(RUNS)/codes --out $(RUNS)/demo-3
	$(BIN)/momaserve train --init $(RUNS)/demo-3 --skip-steps 40000 --recipe demo-fourth \
		--data $(DICTIONARY) --image-tokenizer $(RUNS)/codes --out $(RUNS)/demo
	$(BIN)/momaserve fit-routers $(RUNS)/demo --data $(DICTIONARY)
	$(BIN)/momaserve train-image-tokenizer --decoder-only --init $(RUNS)/codes \
		--data $(DICTIONARY) --out $(RUNS)/decoder --into $(RUNS)/demo
	$(BIN)/momaserve eval-demo $(RUNS)/demo --data $(DICTIONARY) \
		--routing causal calibrated expert_choice threshold --card

demo-depth: $(STAMP)  ## Train the demo's sibling with mixture of depths into runs/demo-depth (about 1.5 hours)
	$(BIN)/momaserve train --recipe demo-depth --data $(DICTIONARY) \
		--image-tokenizer momaserve/demo/image_tokenizer --out $(RUNS)/demo-depth
	$(BIN)/momaserve fit-routers $(RUNS)/demo-depth --recipe demo-depth --data $(DICTIONARY)
	$(BIN)/momaserve router-report $(RUNS)/demo-depth --recipe demo-depth --data $(DICTIONARY) \
		--out $(RUNS)/demo-depth-report

image:  ## Build the container image (VARIANT=cuda for GPUs; CONTAINER=podman or buildah)
	$(CONTAINER) build --tag momaserve:$(IMAGE_TAG) --tag momaserve:$(VARIANT) \
		--build-arg VARIANT=$(VARIANT) \
		--build-arg VERSION=$(IMAGE_TAG) \
		--build-arg REVISION=$(shell git rev-parse HEAD 2>/dev/null || echo unknown) $(BUILD_ARGS) .

image-check:  ## Build the image from scratch, run it locked down, check what it promises (as root)
	deploy/container/check.sh

deploy-check:  ## Lint and test what is in deploy/: Prometheus rules, the Helm chart, scripts
	deploy/check.sh

peers: $(STAMP)  ## Install the engines that `momaserve bench peers` compares with, into build/peers
	@echo "momaserve: installing other engines, each into its own environment (up to half an hour)"
	$(BIN)/python -m momaserve_bench.peers.install $(PEERS)

clean:  ## Remove the environment and caches (runs/ and build/ stay)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
