# make demo: train a small V4 on 8 simulated devices.   make test: the test suite.   Both make their own environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test clean

$(VENV)/demo.done: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "v4jax needs Python 3.11 or newer; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[plots]'
	touch $@

$(VENV)/test.done: $(VENV)/demo.done
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[tests]'
	touch $@

demo: $(VENV)/demo.done
	JAX_PLATFORMS=cpu $(BIN)/v4jax train configs/demo.py

test: $(VENV)/test.done
	$(BIN)/python -m pytest -n 2 --dist loadfile  # mostly compiling, one core a process

clean:
	rm -rf $(VENV) runs
