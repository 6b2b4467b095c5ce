# Each target sets itself up: a virtual environment in .venv with the pinned versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
WORKERS ?= 2
# A file to a process, as its tests share runs and models. In the order of the names: by number of tests, which is the order
# of pytest-xdist, the longest files would come last.
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: quickstart test test-fast lint format clean

# Digits, a small ViT, four bits: ARGS="--bit_width 3 --output_dir outputs/digits_w3a3" for three.
# One thread: on tensors this small, several only wait for each other.
quickstart: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python run_quantformer.py configs/quickstart.yaml $(ARGS)

test: lint
	$(PYTEST) $(ARGS)

test-fast: lint
	$(PYTEST) -m "not slow" $(ARGS)

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
	rm -rf $(VENV) outputs
