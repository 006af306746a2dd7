# The two commands of a new user: `make quickstart` and `make test`. Both work on a machine with Python >= 3.11 and make.
#
#   make quickstart                  train the tiny model for a few minutes and print what it solves before and after
#   make test                        lint, types and every fast test
#   make test-slow                   the long tests
#   make docs                        the documentation's site, in build/docs; a warning is an error
#   make lint | clean | help
#
# Variables: PYTHON=python3.12   TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu'   VENV=.venv   JOBS=2

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
JOBS ?= 2
CORES := $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
# More than 8 threads slow a model of this size down; the tests run one process a job, so each gets one thread.
THREADS := $(shell [ $(CORES) -gt 8 ] && echo 8 || echo $(CORES))

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PACKAGES := policies recipes rewards rl rollouts
TYPES := .mypy_cache/root

.PHONY: help install quickstart test test-slow docs lint clean
.DELETE_ON_ERROR:

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

install: $(STAMP)

# The stamp holds what was installed: another TORCH or a newer pyproject.toml installs again, anything else does not.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(strip $(TORCH)))
.PHONY: $(STAMP)
endif
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; sys.exit(0 if sys.version_info >= (3, 11) else \
		"unmask needs Python >= 3.11, $(PYTHON) is " + v + ": install a newer one and pass PYTHON=python3.12")'
	@[ -x $(BIN)/pip ] || { echo "make: creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "make: installing $(TORCH) (1-10 minutes: on Linux PyPI serves the CUDA build, several GB)"
	@$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	@echo "make: installing unmask and its dependencies (1-3 minutes)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@echo '$(strip $(TORCH))' > $@

quickstart: $(STAMP)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/unmask train recipes/quickstart.yaml

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not slow"

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m slow

docs: $(STAMP)
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "make: wrote build/docs/index.html"

# The root of the repository is the package `unmask`, whatever the folder is called: mypy finds it through a link of that name.
lint: $(STAMP)
	$(BIN)/ruff check .
	@mkdir -p $(TYPES) && ln -sfn ../.. $(TYPES)/unmask
	cd $(TYPES) && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml --cache-dir .. $(PACKAGES:%=-p unmask.%)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
