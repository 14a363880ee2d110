# `make demo` sets up and runs the main job, `make test` sets up and runs every check, `make gpu` measures on a CUDA card.
# PYTHON=python3.12 picks the interpreter (3.10 to 3.13) that .venv is made with; TORCH=torch==2.12.0 another torch.
# `make gpu-train LABEL_MAPS=folder` trains the 1 mm brain model on a CUDA card for nine minutes; again, it goes on.
# `make test PROCESSES=4` runs whole files of tests in four processes at a time (else as many as there are cores, from
# two to four; 0 is one without xdist).
# `make gpu PYTHON=python3`, with PYTHON on the command line, installs nothing and uses that Python as it is.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test gpu gpu-train clean
# Some machines are told to write no compiled files: each process that the tests start would compile everything again.
export PYTHONDONTWRITEBYTECODE :=

PYTHON ?= python3
TORCH ?= torch==2.13.0
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
PROCESSES ?= $(if $(filter 1 2,$(CORES)),2,$(if $(filter 3,$(CORES)),3,4))
BIN := $(if $(filter Windows_NT,$(OS)),.venv/Scripts,.venv/bin)
PIP := $(BIN)/python -m pip --disable-pip-version-check
CHECKED := Backend InvResSegment Testing

help:
	@sed -n '1,/^$$/s/^# //p' Makefile

demo: .venv/demo.stamp
	$(BIN)/invres demo --output out/demo

test: .venv/test.stamp
	$(BIN)/ruff check --config Backend/pyproject.toml $(CHECKED)
	$(BIN)/ruff format --check --config Backend/pyproject.toml $(CHECKED)
	$(BIN)/mypy --config-file Backend/pyproject.toml Backend/invres
	$(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder

ifeq ($(origin PYTHON),command line)
INVRES := PYTHONPATH=Backend $(PYTHON) -m invres
gpu gpu-train:
else
INVRES := $(BIN)/invres
gpu gpu-train: .venv/bench.stamp
endif

gpu:
	$(INVRES) bench all --device cuda --patch 128 128 128 --output Testing/Benchmarks/gpu

# 124: the nine minutes are over and everything is saved.
gpu-train:
	@test -d "$(LABEL_MAPS)" || { echo "Say where the label maps are: make gpu-train LABEL_MAPS=folder" >&2; exit 2; }
	timeout --foreground --signal=INT 540 env $(INVRES) train --recipe brain-any-contrast-1mm \
		--data "$(LABEL_MAPS)" --output out/brain --device cuda --time 2h --validation-count 2 \
		$(if $(wildcard out/brain/checkpoint.pt),--resume) || test $$? -eq 124

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "$(PYTHON) is not Python 3.10 to 3.13; name one that is: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv

# Torch stands first, and its pin stays named, so that no dependency brings another one.
.venv/torch.stamp: | $(BIN)/python
	$(PIP) install "$(TORCH)"
	touch $@

.venv/demo.stamp .venv/test.stamp .venv/bench.stamp: .venv/%.stamp: .venv/torch.stamp Backend/pyproject.toml
	$(PIP) install "$(TORCH)" --editable "Backend[$*]"
	touch $@

clean:
	rm -rf .venv out build .mypy_cache .pytest_cache .ruff_cache Backend/*.egg-info Backend/build
	find $(CHECKED) -name __pycache__ -type d -prune -exec rm -rf {} +
