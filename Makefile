# make train      install what is needed, then train the quickstart; ARGS='--train.steps=50' overrides
# make test       the test suite; ARGS='-k telemetry' selects
# make lint types ruff and pyright
# make setup      only the virtual environment; PYTHON=python3.12 picks the interpreter,
#                 EXTRAS=dev,cuda13 installs for NVIDIA GPUs
PYTHON ?= python3
EXTRAS ?= dev
ARGS ?=

VENV := .venv
READY := $(VENV)/.jaxrl-ready
RUN := $(VENV)/bin/python

.PHONY: setup train test lint types
.DEFAULT_GOAL := setup

setup: $(READY)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "jaxrl needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>/dev/null || echo missing)." \
	    "Name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@test -x $(RUN) || { echo "Creating $(VENV) with $$($(PYTHON) -V)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing jaxrl and what it needs into $(VENV) (once; a minute or two)"
	@$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]'
	@touch $@

train: setup
	@$(RUN) -m jaxrl.train --config configs/quickstart.yaml $(ARGS)

test: setup
	@$(RUN) -m pytest -q $(ARGS)

lint: setup
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

types: setup
	@$(RUN) -m pyright
