# Targets for people: demo, test, lint, bench, docs, clean. Everything is installed into .venv, by plain pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Twice quiet: errors only.
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq

# Plain mlx has no backend on Linux. For a GPU there: make BACKEND=cuda12 (or cuda13) demo, in a fresh .venv.
ifeq ($(shell uname -s),Darwin)
BACKEND ?=
else
BACKEND ?= cpu
endif
comma := ,
USER_EXTRAS := $(if $(BACKEND),$(BACKEND)$(comma))all
DEV_EXTRAS := $(if $(BACKEND),$(BACKEND)$(comma))dev

.PHONY: demo test fake-metal lint format bench docs clean

demo: $(VENV)/.installed
	@$(BIN)/python examples/demo.py
	@echo "To use flash-moe in this shell: . $(BIN)/activate"

# Tests that measure the machine's memory or time run alone, after the others.
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "not serial"
	$(BIN)/python -m pytest -q -m serial

# Nine tenths of the suite once more, with the library made to believe that it runs on Metal: tests/support/fake_metal.py
# says which tests are left out, and refuses to leave out more. Not part of `make test`: both together take too long.
fake-metal: $(VENV)/.installed-dev
	PYTHONPATH=. $(BIN)/python -m pytest -q -p tests.support.fake_metal -n 2 --dist loadgroup -m "not serial"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/run.py

docs: $(VENV)/.installed-dev
	$(BIN)/python docs/generate_api.py
	$(BIN)/python docs/generate_cli.py
	$(BIN)/python -m pytest -q tests/test_docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "The site is in build/site; to read it: $(BIN)/python -m http.server -d build/site"

clean:
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: a second run installs nothing, a changed pyproject.toml installs again.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) must be Python 3.11 or newer, got $$($(PYTHON) -V). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import platform, sys; sys.exit(platform.system() == "Darwin" and platform.machine() != "arm64")' || \
	  { echo "$(PYTHON) must be an arm64 Python: MLX has no other on a Mac, got one for $$($(PYTHON) -c \
	  'import platform; print(platform.machine())') under Rosetta. Try: make PYTHON=/opt/homebrew/bin/python3 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	@echo "Installing into $(VENV), once; it takes about a minute."
	@$(PIP) install --editable ".[$(USER_EXTRAS)]"
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	@echo "Installing into $(VENV), tools for development included, once; it takes about two minutes."
	@$(PIP) install --editable ".[$(DEV_EXTRAS)]"
	@touch $@ $(VENV)/.installed
