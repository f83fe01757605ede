# make quickstart   train, score and compare four schemes in minutes
# make check        everything a change must pass before it is committed
# make test         the whole test suite
# make test-reliability              kills, faults, damage: a part of all trials, by commit
# make test-nightly AREAS="A B"      all trials of these areas (of all without AREAS)
# make replay TRIAL=A1:17            one trial again, with its output

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: quickstart test test-reliability test-nightly replay check lint clean

quickstart: $(INSTALLED)
	$(BIN)/python train/quickstart.py

test: $(INSTALLED)
	$(BIN)/python -m pytest

RELIABILITY := PYTHONPATH=tests $(BIN)/python -m reliability $(if $(SEED),--seed $(SEED))

test-reliability: $(INSTALLED)
	$(RELIABILITY) --tier ci

test-nightly: $(INSTALLED)
	$(RELIABILITY) --tier nightly $(if $(AREAS),--areas $(AREAS))

replay: $(INSTALLED)
	$(RELIABILITY) --trial $(TRIAL)

check: lint
	$(BIN)/python -m pytest -m fast

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# Installs again only when what is to be installed has changed.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llmnorm needs Python 3.11 or newer; name one: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@
