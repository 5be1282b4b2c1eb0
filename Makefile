# make train   sets everything up (the CUDA build of jax where there is an NVIDIA GPU) and runs the baseline
# make test    sets everything up and passes the tests
# make lint    style and types
# make oracle  the tests against torch, transformers and torchao (large downloads)
# make browser  the tests of the report's page in headless Chromium (Debian: apt-get install chromium; or CHROMIUM=PATH)
# make docs    the documentation as a site, in build/site
# make docs-commands  every command of the README and of docs/, run small, in build/docs-commands
# make gpu-program  the tests of the programs that a GPU would run, compiled without one
#
# ARGS goes to the training script:  make train ARGS="--config.max_steps=300"

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Two processes with whole files each; `make test PARALLEL=` runs them in one, for a debugger.
PARALLEL ?= -n 2 --dist loadfile --no-loadscope-reorder
BIN := $(VENV)/bin
GPU_PROGRAM := $(VENV)-gpu-program
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# The extra of jax that fits the driver: its CUDA version is what nvidia-smi prints in its first lines.
CUDA_MAJOR := $(shell nvidia-smi 2>/dev/null | sed -n 's/.*CUDA [A-Z ]*Version: *\([0-9]*\).*/\1/p' | head -n 1)
ifneq ($(shell nvidia-smi -L 2>/dev/null),)
  ifeq ($(filter 12 13,$(CUDA_MAJOR)),)
    $(error this GPU's driver offers CUDA "$(CUDA_MAJOR)" and jax needs 12 or 13: update the driver)
  endif
  CUDA_EXTRA := [cuda$(CUDA_MAJOR)]
endif

.PHONY: train test oracle browser gpu-program docs docs-commands lint clean

train: $(VENV)/.train
	$(BIN)/python scripts/train.py --config configs/bf16_baseline.py $(ARGS)

# Most of the time of the tests is compilation, and most of that are LLVM's optimizations. What is about exact arithmetic
# is compiled with them, as a user's program is.
# (XLA ends at a flag that it does not know, and that of jax 0.12 no longer knows the last one.)
HAS_EMITTERS := import jaxlib.version as v; print("--xla_cpu_use_fusion_emitters=false" * (v.__version__ < "0.12"))
QUICK = --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true \
	$(shell $(BIN)/python -c '$(HAS_EMITTERS)')

test: $(VENV)/.test
	$(BIN)/python -m pytest -m exact $(PARALLEL)
	XLA_FLAGS="$(QUICK)" $(BIN)/python -m pytest -m "not exact and not oracle and not browser and not gpu_program" $(PARALLEL)

oracle: $(VENV)/.oracle
	$(BIN)/python -m pytest -m oracle

browser: $(VENV)/.test
	$(BIN)/python -m pytest -m browser tests/test_report_browser.py

gpu-program: $(GPU_PROGRAM)/.installed
	$(GPU_PROGRAM)/bin/python -m pytest -m gpu_program tests/test_gpu_program.py

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

docs-commands: $(VENV)/.test
	rm -rf build/docs-commands
	XLA_FLAGS="$(QUICK)" $(BIN)/python tests/campaigns/docs_commands.py build/docs-commands

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "altgrad_jax needs Python 3.11 or newer, this is %d.%d: make PYTHON=python3.11 ..." % v[:2])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: pyproject.toml | $(BIN)/python
	$(INSTALL) -e ".$(CUDA_EXTRA)"
	touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(INSTALL) -e ".[dev]"
	touch $@

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	$(INSTALL) -e ".[docs]"
	touch $@

# torch is pinned to the version these tests were written with.
$(VENV)/.oracle: pyproject.toml | $(BIN)/python
	$(INSTALL) "torch==2.13.0" -e ".[dev,oracle]"
	touch $@

# An environment of its own: wherever the plugin is installed, it writes to stderr when jax starts, and tests read that.
# The compiler must be of jax's own version.
$(GPU_PROGRAM)/.installed: pyproject.toml
	$(PYTHON) -m venv $(GPU_PROGRAM)
	$(GPU_PROGRAM)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	version=$$($(GPU_PROGRAM)/bin/python -c 'import importlib.metadata as m; print(m.version("jax"))') && \
	$(GPU_PROGRAM)/bin/python -m pip install --quiet --disable-pip-version-check \
	    "jax-cuda12-plugin==$$version" "jax-cuda12-pjrt==$$version" -e ".[gpu-program]"
	touch $@

lint: $(VENV)/.test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) $(GPU_PROGRAM) .cache build dist *.egg-info
