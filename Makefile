# make setup                          .venv with pinned versions; mmcv is compiled once (minutes) and then cached
# make setup PYTHON=python3.12        with another interpreter
# make setup TORCH="torch==2.5.1"     with another torch
# make test PYTEST_ARGS="-k reparam"  arguments for pytest

BOOT := $(or $(PYTHON),python3)
VENV_PYTHON := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-detection test test-fast lint clean distclean

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' Makefile | awk -F ':.*## ' '{printf "make %-15s %s\n", $$1, $$2}'
	@echo; sed -n '/^# make/s/^# //p' Makefile

setup: ## Make .venv (resumes after an interruption; nothing to do takes a second)
	@command -v "$(BOOT)" >/dev/null || { echo "error: no Python at '$(BOOT)': choose one with make setup PYTHON=python3.11"; exit 1; }
	@"$(BOOT)" -c 'import sys; sys.version_info >= (3, 10) or sys.exit("error: Python 3.10 or newer is needed, %s is %s: choose one with make setup PYTHON=python3.11" % (sys.executable, sys.version.split()[0]))'
	@"$(BOOT)" scripts/setup_env.py $(if $(TORCH),--torch "$(TORCH)") $(if $(PYTHON),--python "$(PYTHON)")

demo: setup ## Train, reparameterize, evaluate and compare on generated images, into demo/
	$(VENV_PYTHON) tools/demo.py --out demo

demo-detection: setup ## The same for boxes and masks, into demo/detection/
	$(VENV_PYTHON) tools/demo.py --task detection --out demo/detection

test: setup ## All tests
	$(VENV_PYTHON) -m pytest $(PYTEST_ARGS)

test-fast: setup ## Without the tests that train or run whole commands
	$(VENV_PYTHON) -m pytest -m "not slow" $(PYTEST_ARGS)

lint: setup ## Style and types
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m mypy

clean: ## Remove caches and build leftovers; .venv stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .setup
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## Remove .venv too; the cache of compiled mmcv wheels stays
	rm -rf .venv
