# Two commands for a newcomer: `make demo` and `make test`. Both need only Python >= 3.11 and work from any
# directory (make -C path/to/seqmodels demo). PYTHON=... chooses the interpreter, VENV=... the environment.

ROOT := $(dir $(realpath $(lastword $(MAKEFILE_LIST))))
VENV ?= $(ROOT).venv
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
RUN := cd "$(ROOT)" && "$(VENV)/bin/python"
# `make aot` compiles for TPUs and GPUs that need not be there, with the versions in requirements-aot.txt: Python 3.12.
VENV_AOT ?= $(ROOT).venv-aot
PYTHON_AOT ?= $(shell for p in python3.12 python3 "$$HOME"/.pyenv/versions/3.12.*/bin/python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && echo "$$p" && break; done)
# `make test-newest`: with the newest packages that requirements.txt lets in; Python 3.11 gets older ones.
VENV_NEWEST ?= $(ROOT).venv-newest
# A few tests for `make test-newest` and `make aot-test`: the code has to run on these versions too.
NEWEST := tests/test_xla_cpu.py tests/training/test_step.py::test_learns tests/mixers/test_gla.py tests/ops/test_delta_rule.py::test_golden \
	tests/ops/test_softmax_attention.py::test_goldens tests/ops/kernels/tpu/test_softmax_attention.py \
	tests/training/test_topologies.py
RUN_AOT := cd "$(ROOT)" && JAX_PLATFORMS=cpu "$(VENV_AOT)/bin/python"
VENV_DOCS ?= $(ROOT).venv-docs
JOBS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)

# `make test` fails if a test takes more CPU time, fixtures and child processes included (10 is the aim: CONTRIBUTING.md);
# `make test-slow` starts no test after so many minutes.
CPU_LIMIT ?= 20
MINUTES_SLOW ?= 600
# `make test-tools` and `make aot-test`, each
MINUTES_TOOLS ?= 600
PYTEST := -m pytest -n $(JOBS) --dist loadgroup

.PHONY: help docs demo test test-newest test-tools test-slow test-all drills lint wheel benchmark aot aot-test aot-venv aot-python gpu gpu-test gpu-benchmark clean
help:
	@echo "make demo       train softmax and linear attention side by side on built-in stories (minutes)"
	@echo "make test       mixers, ops, data, training, commands;  make lint"
	@echo "make test-tools  rarer cases, comparisons, other libraries' checkpoints, benchmarks, pages, kernels in their interpreter"
	@echo "make test-newest  a few of them with the newest packages, on Python 3.12"
	@echo "make test-all   every test: also every form of every mixer with all its options under every law, and long sweeps"
	@echo "make wheel      the package that pip installs, built and tried in a clean environment"
	@echo "make docs       the documentation as a site, into site/; a dead link fails"
	@echo "make drills     kills, damaged and hostile files, full disks, odd values (5 minutes; LONG=1: hours)"
	@echo "make benchmark  speed of a training step, against PyTorch where it is installed"
	@echo "make aot        compiles the kernels and three training steps for TPU v5e, v6e and Hopper, on any machine"
	@echo "make aot-test   the GPU kernels' tests (in an interpreter) and a few others on the versions of make aot"
	@echo "make gpu        on an NVIDIA GPU: are the kernels right, how fast, beside other libraries, what decides most first"

# The stamps say when it was installed: a changed requirements file installs again.
$(VENV)/run.stamp: $(ROOT)requirements.txt
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 found; pass PYTHON=/path/to/python" >&2; exit 1; }
	@test -x "$(VENV)/bin/python" || "$(PYTHON)" -m venv "$(VENV)"
	@echo "installing requirements.txt into $(VENV) (about a minute the first time)" >&2
	@"$(VENV)/bin/python" -m pip install --quiet --disable-pip-version-check -r "$(ROOT)requirements.txt"
	@touch "$@"

$(VENV)/dev.stamp: $(VENV)/run.stamp $(ROOT)requirements-dev.txt
	@"$(VENV)/bin/python" -m pip install --quiet --disable-pip-version-check -r "$(ROOT)requirements-dev.txt"
	@touch "$@"

demo: $(VENV)/run.stamp
	@$(RUN) scripts/demo.py

test: $(VENV)/dev.stamp
	@$(RUN) $(PYTEST) --cpu-limit=$(CPU_LIMIT)

test-newest: aot-python
	@$(MAKE) --no-print-directory -f "$(ROOT)Makefile" VENV="$(VENV_NEWEST)" PYTHON="$(PYTHON_AOT)" "$(VENV_NEWEST)/dev.stamp"
	@cd "$(ROOT)" && "$(VENV_NEWEST)/bin/python" $(PYTEST) -m "not slow" $(NEWEST)

test-tools: $(VENV)/dev.stamp
	@$(RUN) $(PYTEST) -m "tools and not slow" --minutes=$(MINUTES_TOOLS)

# What make test-all adds to the two above: the contract, then the rest.
test-slow: $(VENV)/dev.stamp
	@$(RUN) $(PYTEST) -m slow --minutes=$(MINUTES_SLOW) tests/contract tests

test-all: $(VENV)/dev.stamp
	@$(RUN) $(PYTEST) -m ""

docs: $(VENV_DOCS)/run.stamp
	@cd "$(ROOT)" && NO_MKDOCS_2_WARNING=1 "$(VENV_DOCS)/bin/python" -m mkdocs build --strict --quiet
	@echo "the site is in site/; to read it while writing: $(VENV_DOCS)/bin/python -m mkdocs serve"

$(VENV_DOCS)/run.stamp: $(ROOT)requirements-docs.txt
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 found; pass PYTHON=/path/to/python" >&2; exit 1; }
	@test -x "$(VENV_DOCS)/bin/python" || "$(PYTHON)" -m venv "$(VENV_DOCS)"
	@"$(VENV_DOCS)/bin/python" -m pip install --quiet --disable-pip-version-check -r "$(ROOT)requirements-docs.txt"
	@touch "$@"

# What a run, a cache and a reader do when they are killed, damaged, out of space, or given hostile files. LONG=1: hours.
drills: $(VENV)/run.stamp
	@cd "$(ROOT)" && JAX_PLATFORMS=cpu TQDM_DISABLE=1 "$(VENV)/bin/python" -m tools.drills $(if $(LONG),--long) $(DRILLS)

lint: $(VENV)/dev.stamp
	@$(RUN) -m ruff check . && $(RUN) -m ruff format --check --quiet .

# What `pip install git+...` makes, built and tried in a clean environment (half a minute of CPU time).
wheel: $(VENV)/run.stamp
	@bash "$(ROOT).ci/wheel.sh" "$(VENV)/bin/python"

benchmark: $(VENV)/run.stamp
	@$(RUN) scripts/benchmark.py --suite=train

aot-python:
	@test -n "$(PYTHON_AOT)" || \
		{ echo "this needs Python 3.12 and found none; pass PYTHON_AOT=/path/to/python3.12" >&2; exit 1; }

$(VENV_AOT)/run.stamp: $(ROOT)requirements.txt $(ROOT)requirements-dev.txt $(ROOT)requirements-aot.txt
	@test -x "$(VENV_AOT)/bin/python" || \
		{ $(MAKE) --no-print-directory -f "$(ROOT)Makefile" aot-python && "$(PYTHON_AOT)" -m venv "$(VENV_AOT)"; }
	@echo "installing requirements-aot.txt into $(VENV_AOT) (two minutes the first time)" >&2
	@"$(VENV_AOT)/bin/python" -m pip install --quiet --disable-pip-version-check -r "$(ROOT)requirements-aot.txt"
	@touch "$@"

aot-venv: $(VENV_AOT)/run.stamp

aot: $(VENV_AOT)/run.stamp
	@$(RUN_AOT) -m tools.aot

aot-test: $(VENV_AOT)/run.stamp
	@$(RUN_AOT) $(PYTEST) -m gpu_kernels --minutes=$(MINUTES_TOOLS)
	@$(RUN_AOT) $(PYTEST) -m "not slow" $(NEWEST)

# For an environment with jax[cuda13] >= 0.11 and pytest; PYTHON_GPU=... names another one's Python. What MINUTES end goes on from there.
PYTHON_GPU ?= $(VENV)/bin/python
MINUTES ?= 60
RUN_GPU := cd "$(ROOT)" && JAX_PLATFORMS=cuda "$(PYTHON_GPU)"

# The list by rank: what half an hour should answer first. CARRY (compiled programs, float64 numbers) goes from one device to the next.
CARRY ?= $(ROOT)runs/gpu
gpu:
	@$(RUN_GPU) scripts/benchmark.py --suite=gpu --minutes=$(MINUTES) --carry="$(CARRY)" --out=benchmarks/results/gpu.json

gpu-test:
	@$(RUN_GPU) -m pytest -m gpu_kernels tests/ops/kernels

gpu-benchmark:
	@$(RUN_GPU) scripts/benchmark.py --suite=kernels --minutes=$(MINUTES) --out=benchmarks/results/kernels_gpu.json
	@$(RUN_GPU) scripts/benchmark.py --suite=models --minutes=$(MINUTES) --out=benchmarks/results/models_gpu.json

clean:
	rm -rf "$(VENV)" "$(VENV_NEWEST)" "$(VENV_AOT)" "$(VENV_DOCS)" "$(ROOT)site" "$(ROOT)runs/demo"
