PYTHON ?= .venv/bin/python

.PHONY: prove
prove:  ## check the Lean proofs, and the bridge from them to the Python
	$(PYTHON) formal/prove.py
	BULEYEAN_PROVE=1 $(PYTHON) -m pytest -q tests/test_formal.py
