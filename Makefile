# Everything runs in .venv, which is made on first use; all that is needed is Python 3.11 or later. What only tests and
# checks need comes with the first of them.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/.installed
DEVELOPED := .venv/.developed
# A process for each of two cores: most tests use one. Those of a file stay together, with what they share.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile
INSTALL := $(BIN)/python -m pip install --quiet --constraint requirements.lock
TORCH := $(shell grep -o 'torch==[0-9.]*' install.sh)
# What the CUDA build of that torch asks for; without a GPU the tests interpret it.
TRITON := triton==3.7.1

.PHONY: help
help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

.PHONY: demo
demo: $(INSTALLED)  ## the main job on bundled data: mine, train, export, measure, compare
	$(BIN)/buleyean demo

.PHONY: test
test: $(DEVELOPED)  ## run the tests, all but the slow ones
	$(PYTEST) -m "not slow"

.PHONY: test-slow
test-slow: $(DEVELOPED)  ## kills, restarts, a browser, Ray, llama-cpp-python (compiled once, minutes)
	$(INSTALL) --editable '.[llama-cpp,ray]'
	-$(MAKE) axe
	$(PYTEST) -m slow

AXE := .cache/axe
.PHONY: axe
axe: $(AXE)/package/axe.min.js  ## fetch axe-core (npm), by which the page's states are checked for screen readers
$(AXE)/package/axe.min.js:
	mkdir -p $(AXE)
	cd $(AXE) && npm pack --silent axe-core@4.11.0 && tar xzf axe-core-4.11.0.tgz package/axe.min.js

.PHONY: pictures
pictures: $(DEVELOPED)  ## draw every state of the Void's page, light and dark, at three widths, into .cache/pictures
	$(BIN)/python docs/pictures.py .cache/pictures

.PHONY: hostile
hostile: $(DEVELOPED)  ## every attack on the commands at full scale: hostile files, kills, full disks, endpoints (hours)
	BULEYEAN_HOSTILE=1 $(PYTEST) tests/hostile

.PHONY: test-studies
test-studies: $(DEVELOPED)  ## run the studies' own tests
	$(BIN)/python -m pytest studies/tests

.PHONY: test-all
test-all: test test-slow test-studies  ## all of them

.PHONY: sanitize
sanitize: $(DEVELOPED)  ## run the kernels' tests under ASan and UBSan, built by gcc and by clang
	bash .ci/sanitize $(BIN)/python

.PHONY: check
check: $(DEVELOPED)  ## lint, format and type checks, and the C sources without a warning
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m buleyean_rl.kernels.build --check

.PHONY: bench
bench: $(DEVELOPED)  ## time training beside its peers; writes this processor's rows of bench/results.csv
	$(INSTALL) --editable '.[bench]'
	$(BIN)/python bench/run.py

.PHONY: docs
docs: $(DEVELOPED)  ## write the command reference and the table of settings again
	$(BIN)/python docs/commands.py > docs/commands.md
	$(BIN)/python docs/config.py > docs/config.md

.PHONY: prove
prove: $(DEVELOPED)  ## check the Lean proofs, and the bridge from them to the Python
	$(BIN)/python formal/prove.py
	BULEYEAN_PROVE=1 $(BIN)/python -m pytest -q tests/test_formal.py

# Its tools and its environment are its own, so that nothing of .venv helps the wheel along.
DIST := .cache/dist
.PHONY: dist
dist:  ## build wheel and sdist, check them, and run README's commands from the wheel in a new environment (minutes)
	test -x $(DIST)/bin/python || $(PYTHON) -m venv $(DIST)
	$(DIST)/bin/python -m pip install --quiet 'build>=1.2,<2' 'twine>=6,<7'
	rm -f dist/buleyean_rl-*
	$(DIST)/bin/python -m build --quiet
	$(DIST)/bin/twine check --strict dist/buleyean_rl-*
	$(DIST)/bin/python .ci/check_dist.py dist/buleyean_rl-*

# Resolved, not installed: the newest versions that pyproject.toml allows. torch stays apart, with what only its CUDA
# build brings.
APART := buleyean-rl|torch|setuptools|cuda-.*|nvidia-.*
.PHONY: lock
lock:  ## renew requirements.lock
	$(PYTHON) -m venv .cache/lock
	.cache/lock/bin/python -m pip install --quiet --upgrade pip
	.cache/lock/bin/python -m pip install --dry-run --ignore-installed $(TORCH) $(TRITON) \
		'.[dev,bench,llama-cpp,ray]' > .cache/lock/resolved
	{ echo '# What `make` installs, for pip --constraint; torch apart. Renewed by `make lock`.'; \
		sed -n 's/^Would install //p' .cache/lock/resolved | tr ' ' '\n' | sed -E 's/-([^-]+)$$/==\1/' \
		| grep -vE '^($(APART))==' | LC_ALL=C sort -f; } > requirements.lock
	rm -rf .cache/lock

$(INSTALLED): pyproject.toml requirements.lock install.sh
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	sh install.sh $(BIN)/python --editable '.[language,void]'
	touch $@

$(DEVELOPED): $(INSTALLED)
	$(INSTALL) --editable '.[dev]'
	touch $@
