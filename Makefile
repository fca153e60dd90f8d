# Everything a person does here. Each target that needs the environment makes it first.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo train-wmt14 translate evaluate experts tensorboard test test-all test-faults check bench bench-gpu clean

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

PAIR ?= en-de
EXPERIMENT ?= wmt14_en_de_moe_32
# Further settings for a command, such as ARGS="training.max_steps=300".
ARGS ?=
IN ?= -
OUT ?= -

help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(READY)  ## build .venv with the versions of constraints.txt

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make setup PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY)  ## train a small MoE translator on the embedded phrasebook and translate with it (PAIR=en-fr for French)
	@$(BIN)/nmt train experiment=demo corpus.source_language=$(word 1,$(subst -, ,$(PAIR))) \
		corpus.target_language=$(word 2,$(subst -, ,$(PAIR))) run.name=demo-$(PAIR) $(ARGS) > /dev/null
	@$(BIN)/nmt evaluate runs/demo-$(PAIR) --show 10
	@echo && $(BIN)/nmt experts runs/demo-$(PAIR)
	@echo && echo "run         runs/demo-$(PAIR)" && echo "curves      runs/demo-$(PAIR)/tensorboard (make tensorboard)" && \
		echo "model       runs/demo-$(PAIR)/checkpoints" && \
		echo "translate   echo 'The train to Berlin leaves at 14:35.' | $(BIN)/nmt translate runs/demo-$(PAIR)"

train-wmt14: $(READY)  ## prepare WMT14, train EXPERIMENT on all GPUs (default wmt14_en_de_moe_32), score newstest2014
#	With run.name or run.directory in ARGS, name the run's folder in RUN too.
	$(BIN)/nmt prepare experiment=$(EXPERIMENT) $(ARGS)
	$(BIN)/nmt train --processes gpu experiment=$(EXPERIMENT) $(ARGS)
	$(BIN)/nmt evaluate $(or $(RUN),runs/$(EXPERIMENT)) --show 5

translate: $(READY)  ## translate a file: RUN=runs/demo-en-de IN=input.txt OUT=output.txt
	@$(if $(RUN),,$(error give RUN=, the folder of a run))$(BIN)/nmt translate $(RUN) $(IN) -o $(OUT) $(ARGS)

evaluate: $(READY)  ## score a run on its own test set: RUN=runs/demo-en-de
	@$(if $(RUN),,$(error give RUN=, the folder of a run))$(BIN)/nmt evaluate $(RUN) $(ARGS)

experts: $(READY)  ## how the experts of a run share the work: RUN=runs/demo-en-de
	@$(if $(RUN),,$(error give RUN=, the folder of a run))$(BIN)/nmt experts $(RUN) $(ARGS)

tensorboard: $(READY)  ## curves of all runs in a browser
	$(BIN)/tensorboard --logdir runs

check: $(READY)  ## style and types: ruff and mypy
	$(BIN)/ruff check nmt tests scripts
	$(BIN)/ruff format --check nmt tests scripts
	$(BIN)/mypy

test: check  ## style, types and the fast tests
	$(BIN)/pytest --numprocesses=auto

test-all: check  ## the same with the slow tests, as CI runs them
	$(BIN)/pytest --numprocesses=auto -m ""

test-faults: $(READY)  ## inject faults into training and count what survives (QUICK=1: what CI runs)
	$(BIN)/python -m tests.faults $(if $(QUICK),--quick)

bench: $(READY)  ## speed on this CPU, against plain torch parts
	$(BIN)/python scripts/bench/cpu.py
	$(BIN)/python scripts/bench/translate.py

bench-gpu: $(READY)  ## speed on one GPU: training, the MoE layer, and the positions of a search
	$(BIN)/python scripts/bench/gpu.py
	$(BIN)/python -m scripts.bench.decode

clean:  ## remove caches and builds; runs and prepared corpora stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
