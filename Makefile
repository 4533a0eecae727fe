# make setup                          create .venv with pinned versions; nothing is compiled
# make setup PYTHON=python3.12        use another interpreter
# make setup TORCH="torch==2.5.1"     use another torch
# make setup EXTRAS=timm,onnx         add optional dependencies; torch stays as it is
# make setup MMCV=compiled            compile mmcv's operators (10 minutes on 2 cores, then cached)
# make test VENV=.venv-2.5            use another environment than .venv, with choices of its own
# make test PYTEST_ARGS="-k reparam"  pass arguments to pytest

BOOT := $(or $(PYTHON),python3)
VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
SETUP := scripts/setup_env.py --venv "$(VENV)" $(if $(TORCH),--torch "$(TORCH)") $(if $(PYTHON),--python "$(PYTHON)") \
	$(if $(MMCV),--mmcv "$(MMCV)") $(if $(EXTRAS),--extras "$(EXTRAS)")
# One worker for each core and one thread for each worker (tests/conftest.py). A file's tests stay on one worker, which
# builds their fixtures once; conftest.py puts the slow files first.
PYTEST := $(VENV_PYTHON) -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-detection test test-all lint format clean distclean

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' Makefile | awk -F ':.*## ' '{printf "make %-15s %s\n", $$1, $$2}'
	@echo; sed -n '/^# make/s/^# //p' Makefile

setup: ## Create .venv (takes a second if it is up to date)
	@command -v "$(BOOT)" >/dev/null || { echo "error: no Python at '$(BOOT)': choose one with make setup PYTHON=python3.11"; exit 1; }
	@"$(BOOT)" -c 'import sys; sys.version_info >= (3, 10) or sys.exit("error: Python 3.10 or newer is needed, %s is %s: choose one with make setup PYTHON=python3.11" % (sys.executable, sys.version.split()[0]))'
	@"$(BOOT)" $(SETUP)

demo: setup ## Train, reparameterize and evaluate on generated images, into demo/ (4 minutes on 2 cores)
	$(VENV_PYTHON) tools/demo.py --out demo --overwrite

demo-detection: setup ## The same for boxes and masks, into demo/detection/ (5 minutes on 2 cores)
	$(VENV_PYTHON) tools/demo.py --task detection --out demo/detection --overwrite

test: setup ## Fast tests: no training, no processes
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-all: setup ## All tests
	$(PYTEST) $(PYTEST_ARGS)

lint: setup ## Check formatting, style and types
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m mypy

format: setup ## Format all files
	$(VENV_PYTHON) -m ruff format .
	$(VENV_PYTHON) -m ruff check --fix .

clean: ## Remove caches and build files; keep .venv
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .setup
	find . -path './.venv*' -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## Remove the environment too; keep the cache of compiled mmcv wheels
	rm -rf $(VENV)
