# `make` or `make help` lists the commands. A machine needs python3 with venv, and make; the rest goes into .venv.

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
# Fast, and between them they use every dependency. Old versions warn about what they depend on, but work.
WITH_LOWEST := -W ignore::DeprecationWarning --deselect tests/test_tutorials.py::test_chapter_runs_without_a_warning \
  $(foreach name,bad_input checkpoint classification cli data dependencies distributions jobs plots pyro_interop report \
  representations fit tutorials sources,$(wildcard tests/test_$(name).py tests/*/test_$(name).py))

.DEFAULT_GOAL := help
.PHONY: help tour quick test durations lowest check pyright format tutorials docs bench kills clean
# Two installs into one environment must not run side by side.
.NOTPARALLEL:
# Where Python may not keep compiled modules, each of hundreds of processes compiles those of torch again, for seconds.
unexport PYTHONDONTWRITEBYTECODE

help:  ## list the commands
	@echo 'usage: make COMMAND [ARGS="..."] [PYTHON=python3]'
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

tour: $(VENV)/.installed  ## train and compare every family on real digits, write tour/report.html (ARGS=--quick, ARGS=--images)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/dgm tour $(ARGS)

quick: $(VENV)/.installed-test  ## run the fast tests of every module, in under two minutes on two cores (ARGS="-k vae")
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow" $(ARGS)

test: $(VENV)/.installed-test  ## run the tests of every day (ARGS="-k vae"; ARGS=--all adds those of the night)
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

durations: $(VENV)/.installed-test  ## run them and write tests/durations.json, by which `make quick` chooses
	$(BIN)/python -m pytest -n auto --dist worksteal --record-durations

lowest: $(LOWEST)/.installed  ## test with the lowest versions of all dependencies, on Python 3.11 (ARGS="-k cli")
	$(LOWEST)/bin/python -m pytest -n auto --dist worksteal -m "not slow" $(WITH_LOWEST) $(ARGS)

check: $(VENV)/.installed-dev  ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

pyright: $(VENV)/.installed-dev  ## read a user's script as pyright does (fetches node where there is none)
	$(BIN)/pyright

format: $(VENV)/.installed-dev  ## put the code into the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

tutorials: $(VENV)/.installed-test  ## run the tutorial scripts, hold them to what they claim, write their notebooks
	$(BIN)/python tutorials/execute.py $(ARGS)

docs: $(VENV)/.installed-docs  ## build the site, build/site/index.html (ARGS=--check reads every page in a headless Chromium)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} nice $(BIN)/python docs/build.py $(ARGS)

# Those that take the command line of timing.py; the others need data or hours.
BENCHMARKS := $(shell grep -l '^from timing import' benchmarks/*.py)

bench: $(VENV)/.installed-bench  ## time everything beside its peers, write bench/*.json (ARGS="--quick")
	for script in $(BENCHMARKS); do \
	  OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python $$script --json bench/$$(basename $$script .py).json $(ARGS) \
	  || exit 1; \
	done

kills: $(VENV)/.installed-test  ## kill trainings, sweeps and tours at random moments and resume them (ARGS="--kills 50")
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/kills.py $(ARGS)

clean:  ## remove .venv, .venv-lowest, caches and build outputs; runs/, tour/ and bench/ stay
	rm -rf $(VENV) $(LOWEST) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp per set of dependencies: pip runs again only when what it would install has changed. Larger sets hold the
# smaller ones. Python compiles a module when it is first imported; pip would compile all, for half of its time.
$(VENV)/.installed: EXTRAS :=
$(VENV)/.installed-test: EXTRAS := [test]
$(VENV)/.installed-test: SMALLER := $(VENV)/.installed
$(VENV)/.installed-dev: EXTRAS := [dev]
$(VENV)/.installed-dev: SMALLER := $(VENV)/.installed $(VENV)/.installed-test
$(VENV)/.installed-docs: EXTRAS := [docs]
$(VENV)/.installed-docs: SMALLER := $(VENV)/.installed
$(VENV)/.installed-bench: EXTRAS := [bench]
$(VENV)/.installed-bench: SMALLER := $(VENV)/.installed
STAMPS := $(addprefix $(VENV)/.installed,-test -dev -docs -bench)
$(VENV)/.installed $(STAMPS): pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-compile --disable-pip-version-check -c constraints.txt -e '.$(EXTRAS)'
	@touch $(SMALLER) $@

$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	test -x $(LOWEST)/bin/pip || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --no-compile --disable-pip-version-check -c constraints-lowest.txt -e '.[test]'
	@touch $@
