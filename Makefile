# Chasqui's commands. Everything runs in .venv, which `make env` creates.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# PyTorch from another index, e.g. TORCH_INDEX=https://download.pytorch.org/whl/cpu for the CPU-only build.
TORCH_INDEX ?=
PROTOS := $(wildcard protos/llama/v1/*.proto)

.DEFAULT_GOAL := help
.PHONY: help env chat test test-thorough lint format proto sync-client bench bench-baselines up down

help: ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

# The CPU's kernels are compiled when the package is installed, also in editable form.
$(VENV)/.installed: pyproject.toml constraints.txt $(wildcard model_service/model/cpu/source/*.* model_service/model/cpu/source/*/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Chasqui needs Python 3.11 or newer; name one with PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
		--constraint constraints.txt --editable '.[all,dev]'
	@PYTHONPATH=. $(BIN)/python deploy/report_kernels.py
	touch $@

env: $(VENV)/.installed ## make the environment in .venv

# The value of ASK as it was given: neither make nor the shell may expand it.
chat: env ## start all services on the demonstration checkpoint and talk; ASK="…" asks once; MODEL=smollm2 is a trained model
	@$(if $(MODEL),settings="$$($(BIN)/python -m chasqui.published_models '$(MODEL)')" && eval "$$settings" &&) \
	$(BIN)/chasqui chat --serve $(if $(value ASK),--ask '$(subst ','\'',$(value ASK))')

test: env ## run the tests
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not alone and not thorough"
	$(BIN)/pytest -m "alone and not thorough"

test-thorough: env ## run those that `make test` leaves out: each further page, path, precision and benchmark
	$(BIN)/pytest -m thorough

lint: env ## formatting, types, import rules, protos, and the house's rooms and words
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	$(BIN)/buf breaking --against protos/v1.txtpb
	$(BIN)/python deploy/generate_protos.py --check
	$(BIN)/python deploy/generate_sync_client.py --check
	$(BIN)/python .ci/check_rooms.py
	$(BIN)/python .ci/check_reading_list.py
	$(BIN)/python .ci/check_language.py

format: env ## rewrite the sources in house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/buf format --write

proto: env ## regenerate llama/v1 from protos
	$(BIN)/python deploy/generate_protos.py

sync-client: env ## regenerate the synchronous client from the asyncio one
	$(BIN)/python deploy/generate_sync_client.py

bench: env ## measure the engine; ARGS="--shapes 1.1B" passes flags on
	$(BIN)/python -m bench.engine $(ARGS)

bench-baselines: env ## compare with transformers, llama.cpp and vLLM on this machine
	$(BIN)/python -m bench.baselines $(ARGS)

up: ## docker compose: build, start, wait until healthy
	docker compose up --build --detach --wait

down: ## docker compose: stop
	docker compose down
