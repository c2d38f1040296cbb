# Two commands do everything on a fresh machine with Python 3.11 or later:
#   make demo    a real model answers a question
#   make test    lint, types, tests

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CODE := jaxllm pallas_kernels scripts tests
# Versions that CI ran with; a user's own installation is bound by pyproject.toml only.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint format types unit clean

demo: $(VENV)/.installed
	$(BIN)/jaxllm generate smollm2-135m-instruct --chat --stream \
		--prompt "What is the capital of France?" --temperature 0 --max-tokens 64

test: lint types unit

lint: $(VENV)/.installed-test
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

types: $(VENV)/.installed-test
	$(BIN)/mypy

unit: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q --durations=15 -n 2 --dist loadfile -m "not alone"
	$(BIN)/python -m pytest -q --durations=5 -m alone

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

clean:
	rm -rf $(VENV) build dist *.egg-info

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jaxllm needs Python 3.11 or later; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(PIP_INSTALL) -e .
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	$(PIP_INSTALL) -e '.[test]'
	touch $@ $(VENV)/.installed
