# make demo    install into .venv, make a packed FP4 model and its report
# make test    install into .venv, run the test suite
# make lint    ruff and mypy
# make native  build the native CPU library beside the sources
# make wheel   the wheel and the source distribution in dist/, the wheel tried in an empty environment without a compiler
# make bench   the benchmarks that belong to the documentation
#
# PYTHON=python3.12        the Python that makes .venv
# TORCH=torch==2.13.0      another torch than the pinned CPU build: whatever pip installs under that name
PYTHON ?= python3
TORCH ?=
BIN := .venv/bin
TESTS ?=

# Stamps, newer than what they were made from, so that a second run starts at once. A change of TORCH makes a new one.
TORCH_STAMP := .venv/.torch-$(shell printf '%s' '$(TORCH)' | cksum | cut -d' ' -f1)
RUN_STAMP := .venv/.installed
DEV_STAMP := .venv/.installed-dev

.PHONY: demo test lint native wheel bench
.DELETE_ON_ERROR:

demo: $(RUN_STAMP)
	$(BIN)/difloat demo

test: $(DEV_STAMP)
	$(BIN)/python -m pytest $(TESTS)

lint: $(DEV_STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

native:
	cmake -S . -B build/native -DCMAKE_BUILD_TYPE=Release
	cmake --build build/native --parallel
	cmake --install build/native --prefix src

wheel:
	PYTHON="$(PYTHON)" .ci/wheel

bench: $(RUN_STAMP)
	for script in benchmarks/*.py; do $(BIN)/python "$$script" || exit 1; done

# pip is what a broken virtual environment lacks, so it stands for a whole one.
$(BIN)/pip:
	@command -v $(PYTHON) >/dev/null || { echo "difloat needs Python 3.10 or newer, but there is no '$(PYTHON)': install it or say PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "difloat needs Python 3.10 or newer, got %d.%d: say PYTHON=python3.12 or the like" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv

# torch comes first and alone: only here does pip look at the index of CPU builds, and its dependencies follow below.
$(TORCH_STAMP): constraints-cpu.txt | $(BIN)/pip
	$(BIN)/pip install --quiet --no-deps $(if $(TORCH),'$(TORCH)',--constraint constraints-cpu.txt torch)
	rm -f .venv/.torch-*
	touch $@

$(RUN_STAMP): $(TORCH_STAMP) pyproject.toml CMakeLists.txt $(wildcard src/difloat/kernels/csrc/*)
	$(BIN)/pip install --quiet --editable .
	touch $@

# A test runs one file of vLLM-Omni, whose dependencies ask for a GPU.
$(DEV_STAMP): $(RUN_STAMP)
	$(BIN)/pip install --quiet --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps 'vllm-omni>=0.30' || echo "vLLM-Omni is not to be had here: the test that runs its loader is skipped"
	touch $@
