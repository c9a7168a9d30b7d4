# `make demo` and `make test` need Python >= 3.11, pip and make; everything they install goes into .venv.
# PYTHON=python3.12 chooses another interpreter; pip's own settings (PIP_* variables, pip.conf) choose the package index.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PURE := .venv-pure

.PHONY: demo test pure coverage slow engines bench lint clean

demo: $(STAMP)
	$(RUN) examples/demo

# Two workers of one thread each: on two cores nearly twice as fast as one with two.
test: lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile

# The tests of the rooms that need no torch, without it, in seconds: for other Pythons (make pure PYTHON=python3.13).
pure:
	$(PYTHON) -m venv --clear $(PURE)
	$(PURE)/bin/python -m pip install --constraint constraints.txt numpy scipy pydantic pyyaml filelock pytest
	$(PURE)/bin/python -m pytest --pure

# What `make test` runs, under a tracer, which takes a third longer.
coverage: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile --cov --cov-report=term

slow: $(STAMP)
	$(RUN) -m pytest -m "slow or browser"

engines: $(STAMP)
	$(RUN) -m pip install --constraint constraints.txt --editable '.[engines]'
	$(RUN) -m pytest -m engines

bench: $(STAMP)
	$(RUN) -m pytest -m bench -s

lint: $(STAMP)
	$(RUN) -m ruff check
	$(RUN) -m mypy

# Installs again only when what is to be installed has changed. torch comes first and alone, so that pip settles on the
# pinned build (a CPU build where the index has one: its local version ranks above the plain one) before anything asks for it.
# A Python without ensurepip (Debian's without python3-venv) gets its pip from the one outside.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("layerprune needs Python >= 3.11, and $(PYTHON) is %d.%d; try PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(RUN) install pip; }
	$(RUN) -m pip install --constraint constraints.txt torch
	$(RUN) -m pip install --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) $(PURE) build dist *.egg-info .coverage .mypy_cache .ruff_cache .pytest_cache
