PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help demo demo-lora test lint types docs clean

help:  ## this list; every target makes the environment that it needs in $(VENV)
	@sed -n 's/^\([a-z-]*\):.*  ## /\1	/p' $(MAKEFILE_LIST)

$(VENV)/demo.done: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "v4jax needs Python 3.11 or newer; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[plots]'
	touch $@

$(VENV)/%.done: $(VENV)/demo.done  # the extra of that name
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[$*]'
	touch $@

demo: $(VENV)/demo.done  ## train a small V4 on 8 simulated devices
	JAX_PLATFORMS=cpu $(BIN)/v4jax train configs/demo.py

demo-lora: $(VENV)/demo.done  ## then adapters on the demo's own fp8 and MXFP4 release
	test -d runs/demo/export || $(MAKE) demo
	rm -rf runs/demo-official
	$(BIN)/v4jax convert runs/demo/export runs/demo-official --dtype official
	JAX_PLATFORMS=cpu $(BIN)/v4jax train configs/demo_lora.py
	rm -rf runs/demo-lora/merged
	$(BIN)/v4jax convert runs/demo-official runs/demo-lora/merged --dtype official --adapter runs/demo-lora/adapter
	JAX_PLATFORMS=cpu $(BIN)/v4jax generate runs/demo-official --prompt 'def times_7(' --max-new-tokens 40
	JAX_PLATFORMS=cpu $(BIN)/v4jax generate runs/demo-lora/merged --prompt 'def times_7(' --max-new-tokens 40

test: $(VENV)/tests.done  ## the test suite
	$(BIN)/python -m pytest -n 2 --dist loadfile  # mostly compiling, one core a process

lint: $(VENV)/lint.done  ## ruff: formatting and rules
	$(BIN)/ruff format --check
	$(BIN)/ruff check

types: $(VENV)/lint.done $(VENV)/tests.done  ## pyright, basic rules
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/docs.done  ## the documentation as a site in site/; a broken link is an error
	$(BIN)/mkdocs build --strict

clean:  ## remove the environment, the site and all runs
	rm -rf $(VENV) runs site
