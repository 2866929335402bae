# Everything sets itself up: a fresh machine needs Python 3.11 with venv and pip, and make.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
GPU    ?= .venv-gpu
MINUTES ?= 8
# Without this the repository root is on sys.path and our kernels/ hides the package of that name.
export PYTHONSAFEPATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test lint compile bench gpu clean

help:            ## this list
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed 's/: *##/\t/; s/: .*##/\t/' | expand -t 12

demo: $(READY)   ## the whole line on a real model, about twelve minutes
	$(BIN)/python bench/demo.py

test: $(READY) lint ## lints, types, import rules and all tests
	$(BIN)/python -m pytest -q

lint: $(READY)   ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

compile: $(READY) ## every GPU kernel compiled for four GPUs by two Tritons, against the committed table
	$(BIN)/python -m qtool.kernels.compile_check
	$(BIN)/pip install -q --no-deps --upgrade --target $(VENV)/triton360 triton==3.6.0
	PYTHONPATH=$(VENV)/triton360 $(BIN)/python -m qtool.kernels.compile_check

bench: $(READY)  ## our packages beside the onnxruntime-genai builder's int4; what measuring costs
	$(BIN)/python bench/speed/cpu.py
	$(BIN)/python bench/speed/measure.py

gpu: $(GPU)/.ready ## on a machine with a GPU: every kernel checked, then timed, then whole models; 9 minutes
	PYTHONPATH=src TRITON_INTERPRET=0 $(GPU)/bin/python bench/speed/gpu.py --minutes $(MINUTES)

clean:           ## remove what the targets above made
	rm -rf $(VENV) $(GPU) .demo

# torch comes first and alone: with it installed, nothing else pulls in a build for another device.
$(READY): constraints.txt pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt setuptools
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[dev,genai]'
	@touch $(READY)

# A torch for CUDA that $(PYTHON) already has is used as it is, with all that lies beside it; pip then installs only what
# is missing. Without a network: PIP_NO_INDEX=1 PIP_FIND_LINKS=<folder of wheels> make gpu.
GPU_NEEDS := torch transformers numpy scipy safetensors tokenizers pydantic PyYAML rich pytest pytest-timeout hypothesis
$(GPU)/.ready: bench/speed/outer_torch.py
	$(PYTHON) -m venv $(GPU)
	$(PYTHON) bench/speed/outer_torch.py $(GPU)
	$(GPU)/bin/pip install -q $(GPU_NEEDS)
	-$(GPU)/bin/pip install -q --no-deps gemlite
	@touch $@
