# make demo    the main job, end to end, on real data
# make test    the whole suite
# make test-extras   what exports to OpenVINO, ExecuTorch, LiteRT and from Keras, in an environment of its own (4 GB)
# make check   lint, format and types
# make peers   the environments of the libraries that benchmarks compare with

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-extras check format peers clean

demo: $(READY)
	$(BIN)/smelt demo --force

test: $(READY)
	$(BIN)/python -m pytest -n 2

EXTRAS := .venv-extras

test-extras: $(EXTRAS)/.ready
	$(EXTRAS)/bin/python -m pytest -W default -p no:anyio tests/extras

$(EXTRAS)/.ready: pyproject.toml setup.py constraints-extras.txt $(wildcard src/smelt/native/*.[ch])
	$(PYTHON) -m venv $(EXTRAS)
	$(EXTRAS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-extras.txt --editable '.[test,onnx,openvino,executorch,litert,keras,llm]'
	touch $@

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(shell command -v $(CC)),$(CC) -std=c11 -O1 -Wall -Wextra -Werror -fsyntax-only $(filter-out %/module.c,$(wildcard src/smelt/native/*.c)))

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml setup.py constraints.txt $(wildcard src/smelt/native/*.[ch])
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

PEERS := nncodec llmcompressor neuralcompressor hqq autoround gptqmodel

peers: $(VENV)/.peers $(PEERS:%=benchmarks/.peers/%/.ready)

$(VENV)/.peers: benchmarks/requirements.txt $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --requirement $<
	touch $@

benchmarks/.peers/%/.ready: benchmarks/requirements-%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	touch $@

clean:
	rm -rf $(VENV) $(EXTRAS) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
