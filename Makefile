# Two commands for a newcomer: `make demo` and `make test`. Both need only Python >= 3.11 and work from any
# directory (make -C path/to/seqmodels demo). PYTHON=... chooses the interpreter, VENV=... the environment.

ROOT := $(dir $(realpath $(lastword $(MAKEFILE_LIST))))
VENV ?= $(ROOT).venv
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
RUN := cd "$(ROOT)" && "$(VENV)/bin/python"
JOBS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)

.PHONY: help demo test test-all lint benchmark clean
help:
	@echo "make demo       train softmax and linear attention side by side on built-in stories (minutes)"
	@echo "make test       every test that CI runs;  make test-all adds the long sweeps;  make lint"
	@echo "make benchmark  speed of a training step, against PyTorch where it is installed"

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
	@$(RUN) -m pytest -n $(JOBS) --dist loadgroup

test-all: $(VENV)/dev.stamp
	@$(RUN) -m pytest -n $(JOBS) --dist loadgroup -m ""

lint: $(VENV)/dev.stamp
	@$(RUN) -m ruff check .

benchmark: $(VENV)/run.stamp
	@$(RUN) scripts/benchmark.py --suite=train

clean:
	rm -rf "$(VENV)" "$(ROOT)runs/demo"
