# `make demo` runs the whole job on real input; `make test` runs every test. Both set everything up themselves.

VENV ?= $(CURDIR)/.venv
PYTHON ?= python3
JOBS ?= 2
BIN := $(VENV)/bin
# The environment is made again when the tested versions or the dependencies change.
KEY := $(shell cat constraints.txt setup.cfg pyproject.toml | sha256sum | cut -c1-16)
READY := $(VENV)/ready-$(KEY)

# DeepSpeed builds one small extension at its first CPU run. Two environments that share the default folder build it
# again in turns, and wait for each other's locks.
export TORCH_EXTENSIONS_DIR := $(VENV)/torch_extensions

.PHONY: demo test test-long bench lint install clean

demo: install
	PATH="$(BIN):$$PATH" bash demo/run.sh

# Files of tests are shared out over two processes: a test may start processes of its own.
test: install lint
	PATH="$(BIN):$$PATH" OMP_NUM_THREADS=1 python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

# What CI runs at reduced counts, at full length: kill -9 at 20 moments (preprocessing, checkpoints), 500 damaged videos decoded and worked on.
test-long: install
	PATH="$(BIN):$$PATH" OMP_NUM_THREADS=1 WAN_ACCEL_KILLS=20 python -m pytest --timeout=3600 tests/preprocessing/test_job.py tests/test_checkpoint_writer.py $(PYTEST_ARGS)
	PATH="$(BIN):$$PATH" OMP_NUM_THREADS=1 python benchmarks/fuzz_videos.py 500 --seed 0
	PATH="$(BIN):$$PATH" OMP_NUM_THREADS=1 python benchmarks/fuzz_videos.py 500 --seed 0 --pipeline clips
	PATH="$(BIN):$$PATH" OMP_NUM_THREADS=1 python benchmarks/fuzz_videos.py 500 --seed 0 --pipeline animate --timeout-seconds 60

# Preprocessing beside the original's way: outside the networks, throughput, memory.
bench: install
	PATH="$(BIN):$$PATH" OMP_NUM_THREADS=1 python benchmarks/preprocess.py --repeats 3
	PATH="$(BIN):$$PATH" OMP_NUM_THREADS=1 python benchmarks/preprocess.py --memory

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy

# An environment that another checkout made (CI keeps one) is pointed at this one, in a second.
install: $(READY)
	@test "$$(cat $(VENV)/checkout 2>/dev/null)" = "$(CURDIR)" || \
	  { $(BIN)/pip install -q --no-deps --no-build-isolation -e . && echo "$(CURDIR)" > $(VENV)/checkout; }

# No prerequisites: a fresh clone's files are new, and the key in the name tells whether they changed.
$(READY):
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install -q -c constraints.txt setuptools wheel
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	echo "$(CURDIR)" > $(VENV)/checkout
	touch $@

clean:
	rm -rf $(VENV) output build *.egg-info
