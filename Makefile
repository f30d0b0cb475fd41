# The workflow. Every target says what it does and is safe to run again.
#
#   make demo        the whole main job on real pictures, in .venv-demo
#   make test        the default tests, in .venv-test (test-slow, test-gpu: the other tiers)
#   make lint type   ruff and clang-format; mypy --strict on the packages that pyproject.toml names
#   make docs        docs/options.md from the declarations in the code, and the plots
#   make bench       kernel benchmarks on the CPU (bench-quick: in half a minute; bench-gpu: on a CUDA device)
#   make setup       .venv-test with everything that the targets above need
#
# Needs git, Python 3.10 to 3.13, pip and make; a C++ compiler makes the kernels fast and is not required.
# Another Python: make test PYTHON=python3.12

PYTHON ?= python3
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# A waiting thread that spins takes a core from the others on a busy machine.
export OMP_WAIT_POLICY ?= PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

TEST := .venv-test
DEMO := .venv-demo
PYTEST := $(TEST)/bin/python -m pytest

# Test processes at a time, each file in one of them. Every process computes on one thread, so that they do not fight.
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))
SPREAD := -n $(JOBS) --dist loadfile
test test-slow: export OMP_NUM_THREADS ?= 1

COMPILED := $(wildcard CMakeLists.txt) $(shell find csrc -type f 2>/dev/null)
INSTALLED := pyproject.toml constraints.txt $(COMPILED)
PACKAGED := $(INSTALLED) $(shell find python kernels -type f -not -name '*.pyc')
SOURCES_CXX := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

.PHONY: help setup demo test test-slow test-gpu lint type bench bench-quick bench-gpu docs clean

help:
	@sed -n '2,11s/^# \{0,1\}//p' Makefile

setup: $(TEST)/.stamp-test $(TEST)/.stamp-dev

demo: $(DEMO)/.stamp
	@echo "== demo: caching, training and sampling on real pictures =="
	$(DEMO)/bin/musubi demo

test: $(TEST)/.stamp-test
	@echo "== test: the default tier =="
	$(PYTEST) $(SPREAD) -m "not slow and not gpu"

test-slow: $(TEST)/.stamp-test
	@echo "== test-slow: long loops and large files =="
	$(PYTEST) $(SPREAD) -m "slow and not gpu"

test-gpu: $(TEST)/.stamp-test
	@echo "== test-gpu: on a CUDA device =="
	$(TEST)/bin/python tests/run_gpu.py

lint: $(TEST)/.stamp-dev
	@echo "== lint: ruff and clang-format =="
	$(TEST)/bin/ruff check .
	$(TEST)/bin/ruff format --check .
	$(if $(SOURCES_CXX),$(TEST)/bin/clang-format --dry-run --Werror $(SOURCES_CXX),@echo "no C++ sources")

type: $(TEST)/.stamp-test $(TEST)/.stamp-dev
	@echo "== type: mypy --strict =="
	$(TEST)/bin/mypy

bench: $(TEST)/.stamp-test
	@echo "== bench: kernels, correctness gates first, then ratios (benchmarks/data.py is a command of its own) =="
	$(TEST)/bin/python benchmarks/kernels.py

bench-quick: $(TEST)/.stamp-test
	@echo "== bench-quick: one weight, half of every gate, a miss measured again up to three times =="
	$(TEST)/bin/python benchmarks/kernels.py --quick --gate 0.5 --out build/bench-quick

bench-gpu: $(TEST)/.stamp-test
	@echo "== bench-gpu: kernels on a CUDA device, correctness first; then ratios, memory and shares of the roofline =="
	$(TEST)/bin/python benchmarks/gpu.py

docs: $(TEST)/.stamp-test
	@echo "== docs: the plots and the options page =="
	$(TEST)/bin/python docs/images/make.py
	$(TEST)/bin/musubi options > docs/options.md.new
	mv docs/options.md.new docs/options.md

clean:
	rm -rf $(TEST) $(DEMO) build dist

# The environments. A stamp is as new as the last install that succeeded. Byte code is left to the first import: to
# compile all of torch and transformers takes longer than the rest of an install.

define make_venv
	@echo "== setup: $(1), from $(PYTHON) =="
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; ok = (3, 10) <= v <= (3, 13); \
	    sys.exit(None if ok else "Python %d.%d: 3.10 to 3.13 are served; name another with PYTHON=python3.12" % v)'
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
endef

# Editable: edits of Python files are seen at once; changes of the C++ sources or of the project file install again.
$(TEST)/.stamp-test: $(INSTALLED)
	$(call make_venv,$(TEST))
	$(TEST)/bin/python -m pip install -q --no-compile -e ".[test]" -c constraints.txt
	@touch $@

$(TEST)/.stamp-dev: pyproject.toml constraints.txt | $(TEST)/.stamp-test
	@echo "== setup: linters into $(TEST) =="
	$(TEST)/bin/python -m pip install -q --no-compile -e ".[test,dev]" -c constraints.txt
	@touch $@

$(DEMO)/.stamp: $(PACKAGED)
	$(call make_venv,$(DEMO))
	$(DEMO)/bin/python -m pip install -q --no-compile ".[demo]" -c constraints.txt
	@touch $@
