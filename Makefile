# Every verb installs what it needs into .venv; ARGS is passed to the tool behind it:
#   make run ARGS="--set seed=1 --out runs/seed1"
PYTHON ?= python3
BIN := .venv/bin
NOTEBOOKS := $(BIN)/python -m tools.run
# Two processes of about 3 GB each; a file's tests share what they have built. Files start in the
# order of testpaths, the longest first.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
.DEFAULT_GOAL := run
.PHONY: setup run run-real sft-smoke sft eval test test-all lint notebooks kernels \
  sweep publish survey site bench gpu-check clean damaged
# Prerequisite of a new installation if Python is gone or a package is missing.
DAMAGED := $(shell $(BIN)/python -c \
  'import sys; from atlas_lib import bootstrap; sys.exit(bool(bootstrap.missing()))' \
  2>/dev/null || echo damaged)

setup: .venv/run.stamp  ## install what the notebooks need

run: setup              ## the whole experiment with the offline overlay, without GPU or hub
	@$(NOTEBOOKS) --overlay offline $(ARGS)

run-real: setup         ## the notebooks on SmolLM2-135M-Instruct, about 15 minutes on two cores
	@$(BIN)/python -m tools.smollm2
	@$(NOTEBOOKS) --overlay smollm2 $(ARGS)

sft-smoke: setup        ## 50 steps of the published recipe on a GPU, without upload
	@$(NOTEBOOKS) 01_data_prep 02_template_audit 03_sft_train --overlay smoke $(ARGS)

sft: setup              ## the published recipe on a GPU
	@$(NOTEBOOKS) 01_data_prep 02_template_audit 03_sft_train $(ARGS)

eval: setup             ## base, SFT and Instruct on IFEval, on a GPU
	@$(NOTEBOOKS) 04_ifeval_eval $(ARGS)

test: .venv/dev.stamp   ## all tests that need only Python
	@$(PYTEST) $(ARGS)

test-all: .venv/dev.stamp  ## also long tests, and what needs package registries or PostgreSQL
	@ATLAS_TEST_DOWNLOADS=1 $(PYTEST) $(ARGS)

lint: .venv/dev.stamp   ## check the style of the code, and style and pairing of the notebooks
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/python -m pytest -q tests/core/test_notebooks.py

notebooks: .venv/dev.stamp  ## regenerate notebooks/*.ipynb from their .py sources
	@$(BIN)/ruff check --fix -q notebooks/*.py
	@$(BIN)/ruff format -q notebooks/*.py
	@$(BIN)/jupytext --quiet --update --to ipynb notebooks/*.py

kernels: .venv/dev.stamp  ## build Kaggle kernels in build/kaggle; VERB=chain pushes and runs them
	@$(BIN)/python -m tools.kernels $(or $(VERB),build) $(ARGS)

sweep: setup            ## start or continue a parameter sweep: SWEEP=lr_rank, a file of configs/sweeps
	@$(BIN)/python -m tools.sweep run $(or $(SWEEP),lr_rank_offline) $(ARGS)

publish: .venv/dev.stamp  ## check a finished run and copy it into results/: RUN=folder
	@$(BIN)/python -m tools.publish $(or $(RUN),runs/sft_qwen05b-offline) $(ARGS)

survey: .venv/dev.stamp  ## judge the loss mask of 786 chat templates; JSON into results/
	@$(BIN)/python -m tools.template_survey --json results/template_survey.json $(ARGS)

site: .venv/dev.stamp   ## build the website in build/site from results/
	@$(BIN)/python -m tools.website

bench: .venv/dev.stamp  ## measure speed, memory and error rates; JSON into results/
	@$(BIN)/python -m benchmarks.audit --json results/bench_audit.json
	@$(BIN)/python -m benchmarks.train --json results/bench_train.json
	@$(BIN)/python -m benchmarks.eval --json results/bench_eval.json
	@$(BIN)/python -m benchmarks.sweep --json results/bench_sweep.json
	@$(BIN)/python -m benchmarks.rigour --json results/rigour.json
	@$(BIN)/python -m benchmarks.seeds --json results/seeds.json
	@$(BIN)/python -m benchmarks.export --json results/bench_export.json

gpu-check: setup        ## prove or refute on your GPU what README claims, within nine minutes
	@$(BIN)/python -m tools.gpu_check $(ARGS)

clean:                  ## delete runs/ and build/, keep the environment
	rm -rf runs build

.venv/run.stamp: requirements.txt $(DAMAGED)
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] <= (3, 13) else \
	  "Atlas needs Python 3.11 to 3.13 and python3 is %d.%d; name another: make PYTHON=python3.12" \
	  % sys.version_info[:2])'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@echo "Installing requirements.txt into .venv (once; about 2 GB)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m atlas_lib.ifeval punkt
	@$(BIN)/python -c "from atlas_lib.evaluate import ifbench; ifbench.ensure_ifbench()"
	@touch $@

.venv/dev.stamp: .venv/run.stamp requirements-dev.txt requirements-site.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
