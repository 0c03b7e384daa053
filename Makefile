# make demo | test | test-isas | bench | lint | sanitize | fuzz | gpu: each sets up what it needs; gpu is gpu-tests gpu-triton gpu-hopper.
#   VENV=path    use this virtual environment instead of .venv
#   PYTHON=...   interpreter that creates the environment (3.10 or later)
#   TORCH=...    requirement for torch, installed first
#   JOBS=n       test processes
#   ARGS=...     more arguments of pytest for `make bench`: ARGS="-k looped" times some of the cases
#   MINUTES=n    how long `make fuzz` goes on; SEED=n repeats a run

VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
JOBS ?= 2
ARGS ?=
MINUTES ?= 60
SEED ?=
BENCH_RESULT ?= bench/results/latest.json

BIN := $(VENV)/bin
BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt \
	$(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')
CPP_FILES = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help demo test test-isas bench lint sanitize fuzz gpu gpu-ready gpu-tests gpu-triton gpu-hopper clean
.DELETE_ON_ERROR:

help:
	@sed -n '1,7p' Makefile

# One test or benchmark process uses one thread unless it asks for more itself.
test: export OMP_NUM_THREADS = 1
bench gpu-tests gpu-triton gpu-hopper: export PYTHONUNBUFFERED = 1

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

bench: $(VENV)/.installed-test
	@mkdir -p $(dir $(BENCH_RESULT))
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-json=build/bench.json --benchmark-quiet $(ARGS)
	$(BIN)/python -m bench.report build/bench.json $(BENCH_RESULT) '$(subst ','\'',$(strip make bench $(if $(ARGS),ARGS="$(ARGS)")))'

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

# The tests of the CPU kernels under AddressSanitizer with UndefinedBehaviorSanitizer, and ThreadSanitizer.
sanitize: $(VENV)/.installed-test
	$(BIN)/python tests/build/sanitize.py

# Ops, options of the sampler, damaged files, threads and a soak side by side: docs/reliability.md.
fuzz: $(VENV)/.installed-test
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) --log build/fuzz.txt

# Each part by itself stays below nine minutes on a machine that has compiled nothing yet: bench.gpu_hopper leaves out
# what would not end by then, and says so.
gpu: gpu-tests gpu-triton gpu-hopper

gpu-ready: $(VENV)/.installed-test
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make gpu: torch finds no GPU on this machine (torch.cuda.is_available() is False)")'
	$(BIN)/pip install -e '.[test,gpu]'

gpu-tests: gpu-ready
	$(BIN)/python -m pytest -m gpu tests bench
	$(BIN)/python -m pytest -m "not gpu" tests/triton --ignore=tests/triton/test_dry_run.py

gpu-triton: gpu-ready
	$(BIN)/python -m bench.gpu

gpu-hopper: gpu-ready
	@if $(BIN)/python -c 'import sys, torch; sys.exit(torch.cuda.get_device_capability()[0] != 9)'; then \
		$(BIN)/python -m bench.gpu_hopper --minutes 9; else echo 'make gpu: the Hopper kernels need an H100 or H200, left out'; fi

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
