# make setup   virtual environment .venv with everything in it
# make test    the test suite             make test PYTEST_ARGS="-k crosskd -x"
# make demo    distil a small detector    make demo QUICK=1 OUT=some/folder SEED=2
# make docs    the documentation, docs/_build/html/index.html
# make lint    black, isort, flake8
#
# test, demo, docs and lint do the set-up first; what is there already is skipped.

# Python 3.10 to 3.13, used to make the environment.
PYTHON ?= python3
VENV ?= .venv
# An interpreter with kd_d2's requirements and Detectron2 in it, to be used as it is: no
# environment is made and nothing is installed. Example: make test ENV_PYTHON=python
ENV_PYTHON ?=
OUT ?= demo_output
QUICK ?=
SEED ?= 1
PYTEST_ARGS ?=
# Processes of pytest-xdist. One on a single core, else two: the tests' models need memory.
WORKERS ?= $(shell [ "$$(nproc 2>/dev/null || echo 1)" -gt 1 ] && echo 2 || echo 0)

ifeq ($(strip $(ENV_PYTHON)),)
RUN = "$(VENV)/bin/python"
SETUP = @$(PYTHON) tools/setup_env.py --venv "$(VENV)"
else
RUN = "$(ENV_PYTHON)"
SETUP = @$(RUN) -c "import torch, torchvision, detectron2, kd_d2"
endif
SOURCES = $(wildcard kd_d2 projects tests tools benchmarks docs setup.py train_net.py)

.PHONY: help setup requirements test demo docs lint

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

setup:
	$(SETUP)

# All but Detectron2, for those who build it from its own repository into the environment.
requirements:
	@$(PYTHON) tools/setup_env.py --venv "$(VENV)" --until requirements

test: setup
	OMP_NUM_THREADS=1 $(RUN) -m pytest $(if $(filter-out 0,$(WORKERS)),-n $(WORKERS)) $(PYTEST_ARGS)

demo: setup
	$(RUN) tools/demo.py --output-dir "$(OUT)" --seed "$(SEED)" $(if $(filter-out 0,$(QUICK)),--quick)

docs: setup
	$(RUN) -m sphinx --fail-on-warning --keep-going -b html -d docs/_build/doctrees docs docs/_build/html

lint: setup
	$(RUN) -m black --line-length 100 --check $(SOURCES)
	$(RUN) -m isort --check-only $(SOURCES)
	$(RUN) -m flake8 $(SOURCES)
