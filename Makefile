# make train      install what is needed, then train the quickstart; ARGS='--train.steps=50' overrides
# make test       the test suite; ARGS='-k telemetry' selects
# make test-rehearse  the tests that compile for GPUs, in an environment with jax's CUDA plug-in (6 GB;
#                 no GPU); make rehearse-setup makes only the environment, .venv-rehearse
# make lint types ruff and pyright
# make setup      only the virtual environment; PYTHON=python3.12 picks the interpreter,
#                 EXTRAS=dev,cuda13 installs for NVIDIA GPUs
# make peers      the environments of the systems measured beside jaxrl; PEERS_PYTHON= and TUNIX_PYTHON=
#                 pick interpreters, PEERS_PIP='...' adds options for pip (say, an index of CPU builds)
# make bench-peers  jaxrl and its peers side by side; ARGS='--rounds 5' overrides
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
	@$(RUN) -m pytest -q -n 2 --dist loadfile $(ARGS)

lint: setup
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

types: setup
	@$(RUN) -m pyright

REHEARSE := .venv-rehearse

.PHONY: rehearse-setup test-rehearse

rehearse-setup: $(REHEARSE)/.ready

$(REHEARSE)/.ready: pyproject.toml
	@test -x $(@D)/bin/python || { echo "Creating $(@D)"; $(PYTHON) -m venv $(@D); }
	@echo "Installing jaxrl with jax's CUDA plug-in into $(@D) (once; a few minutes)"
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev,cuda12]'
	@touch $@

test-rehearse: rehearse-setup
	@JAX_PLATFORMS=cpu $(REHEARSE)/bin/python -m pytest -q -m "not gpu" tests/jaxrl/test_rehearse_g*.py $(ARGS)

PEERS_PYTHON ?= $(PYTHON)
TUNIX_PYTHON ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python3) $(PYTHON))
PEERS_PIP ?=

.PHONY: peers bench-peers

peers: .venv-peers/.ready .venv-tunix/.ready

.venv-peers/.ready: benchmarks/requirements/torch.txt
	@test -x $(@D)/bin/python || { echo "Creating $(@D)"; $(PEERS_PYTHON) -m venv $(@D); }
	@echo "Installing $< into $(@D) (once; a minute or two)"
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(PEERS_PIP) -r $<
	@touch $@

.venv-tunix/.ready: benchmarks/requirements/tunix.txt
	@test -x $(@D)/bin/python || { echo "Creating $(@D)"; $(TUNIX_PYTHON) -m venv $(@D); }
	@echo "Installing $< into $(@D) (once; a minute or two)"
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(PEERS_PIP) -r $<
	@touch $@

bench-peers: setup
	@$(RUN) -m benchmarks.peers $(ARGS)
