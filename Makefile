# Each target sets itself up: a virtual environment in .venv with the pinned versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
WORKERS ?= 2
# A file to a process, as its tests share runs and models. In the order of the names: by number of tests, which is the order
# of pytest-xdist, the longest files would come last.
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: quickstart test test-fast test-native test-sanitized test-avx512 test-neon test-emulated lint format clean

# Digits, a small ViT, four bits: ARGS="--bit_width 3 --output_dir outputs/digits_w3a3" for three.
# One thread: on tensors this small, several only wait for each other.
quickstart: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python run_quantformer.py configs/quickstart.yaml $(ARGS)

test: lint
	$(PYTEST) $(ARGS)

test-fast: lint
	$(PYTEST) -m "not slow" $(ARGS)

# The kernels without Python, by a C++ program: needs g++ alone.
NATIVE := build/native
NATIVE_SOURCES := tests/native/test_kernels.cpp $(wildcard quantformer_hf/csrc/*.cpp)
NATIVE_DEPENDS := $(NATIVE_SOURCES) $(wildcard quantformer_hf/csrc/*.h tests/native/*.h)
NATIVE_FLAGS := -g -Wall -Wextra -std=c++17 -pthread -ffp-contract=off -Wno-psabi -Iquantformer_hf/csrc
# The sanitizers see nothing of what tiles read and write.
EMULATED_AMX := -DQUANTFORMER_EMULATE_AMX -Itests/native
AARCH64 := aarch64-linux-gnu-g++
QEMU ?= qemu-aarch64

test-native: $(NATIVE)/kernels test-sanitized
	$(NATIVE)/kernels

test-sanitized: $(NATIVE)/sanitized
	UBSAN_OPTIONS=print_stacktrace=1 $(NATIVE)/sanitized

# Instruction sets that this machine has not: AVX-512 by SIMDe, AMX by hand, NEON by qemu.
test-emulated: test-avx512 test-neon

test-avx512: $(NATIVE)/avx512
	$(NATIVE)/avx512 avx512 amx

# Of the two processors, the older one has no dot products.
test-neon: $(NATIVE)/aarch64
	$(QEMU) -cpu cortex-a76 $(NATIVE)/aarch64 plain neon neon_dotprod
	$(QEMU) -cpu cortex-a53 $(NATIVE)/aarch64

$(NATIVE)/kernels: $(NATIVE_DEPENDS)
	mkdir -p $(NATIVE)
	$(CXX) -O3 $(NATIVE_FLAGS) $(NATIVE_SOURCES) -o $@

$(NATIVE)/sanitized: $(NATIVE_DEPENDS)
	mkdir -p $(NATIVE)
	$(CXX) -O1 -fsanitize=address,undefined -fno-sanitize-recover=all $(NATIVE_FLAGS) $(EMULATED_AMX) $(NATIVE_SOURCES) -o $@

# SIMDe's own code is not free of warnings.
$(NATIVE)/avx512: $(NATIVE_DEPENDS)
	@echo '#include <simde/x86/avx512.h>' | $(CXX) -E -x c++ - > /dev/null 2>&1 || \
		{ echo "SIMDe is not installed: apt-get install libsimde-dev"; exit 1; }
	mkdir -p $(NATIVE)
	$(CXX) -O1 $(NATIVE_FLAGS) -w -DQUANTFORMER_EMULATE_AVX512 $(EMULATED_AMX) $(NATIVE_SOURCES) -o $@

$(NATIVE)/aarch64: $(NATIVE_DEPENDS)
	@command -v $(AARCH64) > /dev/null && command -v $(QEMU) > /dev/null || \
		{ echo "an Arm compiler or emulator is missing: apt-get install g++-aarch64-linux-gnu qemu-user"; exit 1; }
	mkdir -p $(NATIVE)
	$(AARCH64) -O3 -static $(NATIVE_FLAGS) $(NATIVE_SOURCES) -o $@

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt $(wildcard quantformer_hf/csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) $(NATIVE) outputs
