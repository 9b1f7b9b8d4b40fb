# What contributors run. `make check` is what a change must pass.
PYTHON = .venv/bin/python

.PHONY: setup check lint types test docs
setup:
	python3 -m pipelines.setup

check: lint types test

lint:
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types:
	.venv/bin/mypy

test:
	$(PYTHON) -m pytest

docs:
	$(PYTHON) docs/generate.py
