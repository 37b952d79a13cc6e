# Two commands: `make figures` and `make test`. Both set up .venv first, from nothing if need be.
.PHONY: figures readme test test-frameworks test-versions notebooks test-browser bench bench-tasks \
	bench-throughput gpu lab api site lines
.DEFAULT_GOAL := figures
SHELL := /bin/bash

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PROFILE ?= quick
# One thread per process: runs, tests and notebooks are spread over processes.
export OMP_NUM_THREADS ?= 1

figures: $(STAMP)
	$(BIN)/repeatlab figures --profile $(PROFILE) $(if $(filter-out quick,$(PROFILE)),--figures figures/$(PROFILE))

# What stands between the READMEs' markers, from figures/results.md and docstrings: tests hold them to it.
readme:
	python3 docs/readme.py

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest -n 2 --ignore tests/benchmarks --ignore tests/browser
	$(MAKE) --no-print-directory notebooks

# Task notebooks first: the viewpoints read the studies that they leave in the store.
NBVAL := REPEATLAB_SMOKE=1 $(BIN)/pytest --nbval-lax --nbval-current-env --nbval-sanitize-with tests/nbval.cfg \
	--nbval-cell-timeout 300 -o addopts=-ra

notebooks: $(STAMP)
	$(NBVAL) -n 2 --dist loadfile notebooks/[01]*.ipynb
	$(NBVAL) notebooks/[23]*.ipynb

# In Chromium: JupyterLab runs 00 and 10 to their end, sliders of the site's mapping explorer move. It
# skips, and says so, where there is no browser.
test-browser: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[browser,docs]'
	$(BIN)/pytest tests/browser -rs

# The recipes of docs/frameworks.md in the libraries themselves; `make test` runs those it finds.
test-frameworks: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[frameworks]'
	$(BIN)/pytest tests/frameworks -rs

# Python 3.11 to 3.13 and the lowest declared versions: an environment of 6 GB each, one at a time.
# PYTHONS may name others, or their paths.
test-versions: $(STAMP)
	$(BIN)/python tests/versions.py $(PYTHONS)

# Ratios of interleaved runs in one process; bench-tasks trains every task on real data.
bench: $(STAMP)
	$(BIN)/pytest tests/benchmarks -s --ignore-glob '*/test_task_*.py'

bench-tasks: $(STAMP)
	$(BIN)/pytest tests/benchmarks/test_task_*.py -s

# Runs per hour of every task at reference scale, one by one on one core, and hours of the whole plan:
# a few minutes of timed updates, extrapolated.
bench-throughput: $(STAMP)
	$(BIN)/python tests/benchmarks/throughput.py

# Nine minutes on a CUDA device, with what PYTHON finds; where there is none it says what it would do.
GPU_RESULTS ?= tests/benchmarks/results/gpu
gpu: PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
gpu:
	$(PYTHON) tests/gpu.py $(GPU_RESULTS)

# The pages as a web site, with API, executed notebooks and method cards: build/site/index.html. Needs
# a network only once, for the packages.
site: $(VENV)/.site-installed
	$(BIN)/python docs/website.py build/site

$(VENV)/.site-installed: pyproject.toml constraints.txt | $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

# The API alone, as pages of the public modules: build/api/index.html.
# The warnings left out say that an annotation of a named tuple is shown as it is written.
api: $(VENV)/.site-installed
	$(BIN)/python -W "ignore:Error parsing type annotation" -m pdoc --docformat google \
		--output-directory build/api repeatlab

# Lines of code by wing, and which wing imports which.
lines:
	python3 tests/wings.py

lab: $(STAMP)
	JUPYTER_CONFIG_PATH="$(CURDIR)/etc/jupyter" $(BIN)/jupyter lab --notebook-dir . \
		notebooks/00_quickstart.ipynb

# uv where it can be had, plain pip where not; the lock holds versions only. Then what most processes
# import is compiled, here and once: also where Python is told to write no bytecode.
COMPILE := env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -c
$(STAMP): pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv \
		&& $(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[test]' \
		|| $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	$(COMPILE) "import gymnasium, sklearn.linear_model, torchvision" & \
		$(COMPILE) "import distributed, ipykernel_launcher, ipywidgets, papermill, seaborn" && wait $$!
	touch $(STAMP)
