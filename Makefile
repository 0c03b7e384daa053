# make demo | test | test-isas | test-aarch64 | bench | docs | lint | wheel | test-wheel | sanitize | fuzz | gpu | gpu-quick | gpu-tests:
#     each sets up what it needs.
#   VENV=path    use this virtual environment instead of .venv
#   ENV=system   for gpu: take python3 as it is, without a virtual environment, pip or a network (docs/gpu.md)
#   PYTHON=...   interpreter that creates the environment (3.10 or later)
#   TORCH=...    requirement for torch, installed first
#   JOBS=n       test processes
#   PYTHONS=...  for wheel and test-wheel: one or several interpreters in place of PYTHON
#   ARGS=...     more arguments of pytest for `make bench`: ARGS="-k looped" times some of the cases; of bench.gpu for `make gpu`
#   ISA=avx2     for bench: torch and the kernels compute as on a processor that has AVX2 and nothing more
#   OUT=folder   where `make gpu` puts its results
#   MINUTES=n    how long `make fuzz` goes on; SEED=n repeats a run

VENV ?= .venv
ENV ?= venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
JOBS ?= 2
PYTHONS ?= $(PYTHON)
ARGS ?=
ISA ?=
MINUTES ?= 60
SEED ?=
OUT ?= bench/results
BENCH_RESULT ?= bench/results/latest.json

BIN := $(VENV)/bin
BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt \
	$(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')
CPP_FILES = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help demo test test-isas test-aarch64 bench docs lint wheel test-wheel sanitize fuzz gpu gpu-quick gpu-tests gpu-hopper gpu-ready-venv gpu-ready-system clean
.DELETE_ON_ERROR:

help:
	@sed -n '1,12p' Makefile

# One test or benchmark process uses one thread unless it asks for more itself.
test: export OMP_NUM_THREADS = 1
bench gpu gpu-quick gpu-tests gpu-hopper: export PYTHONUNBUFFERED = 1

# On a GPU first which kernels are right and faster there: once, and again when versions change.
demo: $(VENV)/.installed-test
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		$(BIN)/loopmdm qualify --if-needed || echo 'make demo: plain PyTorch does what the kernels did not do right'; fi
	$(BIN)/loopmdm demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(JOBS)

# The tests as on other processors: AVX2 emulated, other kernels of OpenBLAS, each instruction set of this machine.
test-isas: $(VENV)/.installed-test
	$(BIN)/python tests/isas.py --jobs $(JOBS) --write build/test-isas.txt

# Values and gradients of the ops by kernels of another processor: needs aarch64-linux-gnu-g++ and qemu-aarch64.
test-aarch64: $(VENV)/.installed-test
	$(BIN)/python -m tests.aarch64

ifneq ($(filter-out avx2,$(ISA)),)
$(error ISA: got '$(ISA)', expected 'avx2' or nothing)
endif
ifeq ($(ISA),avx2)
bench: export LOOPMDM_CPU_ISA = avx2
bench: export ATEN_CPU_CAPABILITY = avx2
bench: export ONEDNN_MAX_CPU_ISA = AVX2
bench: export MKL_ENABLE_INSTRUCTIONS = AVX2
# torch.compile keeps its code by source alone, and code for AVX-512 ends here in NaN or in a crash.
bench: export TORCHINDUCTOR_CACHE_DIR = $(CURDIR)/build/inductor-avx2
endif
bench: $(VENV)/.installed-test
	@mkdir -p $(dir $(BENCH_RESULT))
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-json=build/bench.json --benchmark-quiet $(ARGS)
	$(BIN)/python -m bench.report build/bench.json $(BENCH_RESULT) '$(subst ','\'',$(strip make bench $(if $(ISA),ISA=$(ISA)) $(if $(ARGS),ARGS="$(ARGS)")))'

# The documents as a site that fetches nothing: open build/site/index.html. The search needs a server (python3 -m http.server).
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --strict

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

# The source distribution, and from it, without a network, a wheel for each of PYTHONS: in dist/.
wheel:
	$(PYTHON) tests/build/wheels.py build --python $(PYTHONS)

# Those wheels in new environments outside this tree: self-test, training, samples.
test-wheel:
	$(PYTHON) tests/build/wheels.py try dist/*.whl --python $(PYTHONS) --torch '$(TORCH)'

# The tests of the CPU kernels under AddressSanitizer with UndefinedBehaviorSanitizer, and ThreadSanitizer.
sanitize: $(VENV)/.installed-test
	$(BIN)/python tests/build/sanitize.py

# Ops, options of the sampler, damaged files, threads and a soak side by side: docs/reliability.md.
fuzz: $(VENV)/.installed-test
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) --log build/fuzz.txt

# Each ends by itself in less than ten minutes, with a summary of at most 100 lines: docs/gpu.md.
GPU_PYTHON := $(if $(filter system,$(ENV)),$(PYTHON),$(BIN)/python)
GPU_READY := gpu-ready-$(ENV)
GPU_ARGS = --out '$(OUT)' $(ARGS)
gpu gpu-quick gpu-tests gpu-hopper: export PYTHONPATH := $(CURDIR):$(CURDIR)/python$(if $(PYTHONPATH),:$(PYTHONPATH))

gpu: $(GPU_READY)
	$(GPU_PYTHON) -m bench.gpu $(GPU_ARGS)

gpu-quick: $(GPU_READY)
	$(GPU_PYTHON) -m bench.gpu --quick $(GPU_ARGS)

gpu-tests: $(GPU_READY)
	$(GPU_PYTHON) -m bench.gpu --only tests --minutes 9 $(GPU_ARGS)

gpu-hopper: $(GPU_READY)
	$(GPU_PYTHON) -m bench.gpu_hopper $(GPU_ARGS)

gpu-ready-venv: $(VENV)/.installed-test
	$(BIN)/pip install -e '.[test,gpu]'

gpu-ready-system:
	$(PYTHON) -m bench.needs
	$(PYTHON) setup.py -q build_ext --inplace

clean:
	rm -rf build dist loopmdm_kernels/_C*.so python/loopmdm/_sudoku*.so

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or later is needed, got " + sys.version.split()[0] + "; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --upgrade pip

$(VENV)/.torch: | $(BIN)/python
	$(BIN)/pip install '$(TORCH)'
	@touch $@

$(VENV)/.installed-%: $(BUILD_INPUTS) $(VENV)/.torch
	$(BIN)/pip install -e '.[$*]'
	@touch $@
