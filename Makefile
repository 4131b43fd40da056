# Two commands do everything on a fresh machine with python3, python3-venv and g++:
#   make demo    make test
# Variables: PYTHON (python3), VENV (.venv), OUT (where `make gpu` writes), GPU_OPTIONS (of it).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
CXX_FILES := $(SOURCES) $(wildcard tests/cuda_host/*.h tests/cuda_host/*.cuh tests/cuda_host/*.cpp)

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format docs validate bench gpu clean

help:
	@echo "make demo      install, validate, benchmark, train and translate (10 minutes)"
	@echo "make test      install and run the tests"
	@echo "make lint      ruff, mypy, clang-format"
	@echo "make docs      draw the pictures of docs, and its tables of results"
	@echo "make validate  check every kernel against its reference on this machine"
	@echo "make bench     the benchmarks, beside PyTorch"
	@echo "make gpu       build, validate, test and benchmark on a CUDA GPU"

install: $(READY)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import ensurepip, sys; assert sys.version_info >= (3, 11)' || \
	  { echo 'needs Python >= 3.11 with venv: apt-get install python3 python3-venv'; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch comes first and the build is not isolated: the extension must be compiled against the
# torch that will load it.
$(VENV)/torch: constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch setuptools ninja
	@touch $@

$(READY): $(VENV)/torch setup.py pyproject.toml $(SOURCES)
	@command -v $${CXX:-c++} >/dev/null || command -v g++ >/dev/null || \
	  echo 'no C++ compiler: going on without the C++ kernels (apt-get install g++)'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/fused-attn info
	$(BIN)/fused-attn validate --quiet
	$(BIN)/python -m benchmarks.operators --rounds 3 --quick --only fused_attn eager sdpa --out demo_output
	$(BIN)/fused-attn demo --out demo_output

# One OpenMP thread each: two processes with two threads wait for each other. Tests of several
# threads ask for them.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

docs: $(READY)
	$(BIN)/python docs/pictures.py
	$(BIN)/python -m benchmarks.report

validate: $(READY)
	$(BIN)/fused-attn validate

bench: $(READY)
	$(BIN)/python -m pytest benchmarks

# On a machine with a CUDA build of torch and no network: uses its python3 as it is.
gpu:
	$(PYTHON) -m benchmarks.gpu $(if $(OUT),--out $(OUT)) $(GPU_OPTIONS)

clean:
	rm -rf build dist *.egg-info fused_attn/_C*.so demo_output
