# The named commands of this project; CI calls the same ones (.ci/run).

# The interpreter that the virtual environment is made with: `make venv PYTHON=python3.13`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet -c constraints.txt
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-all lint types fmt bench train-digits venv browser clean

# The bundled model: calibrate, save, sample in fp32 and in int8, compare. Minutes on 2 cores.
demo: $(INSTALLED)
	$(BIN)/octavo demo

TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

# Unit tests, and every example of a docstring; a process for each core, each with one thread for torch.
test: $(VENV)/.installed-test browser
	$(TESTS) -m "not more"

# Those, and the cases of tests/support/more.py: run it before a release, and after changing what they are of.
test-all: $(VENV)/.installed-test browser
	$(TESTS)

# Chromium for the tests of the report page; where it cannot be installed, those tests are skipped and say so.
browser:
	@command -v chromedriver >/dev/null || (apt-get update && apt-get install -y --no-install-recommends \
		chromium chromium-driver) >/dev/null 2>&1 || echo "no Chromium: the tests of the report page will be skipped"

# Style, and the one-way order of the rooms.
lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# Static types of the package.
types: $(INSTALLED)
	$(BIN)/mypy

# Rewrite the sources in the project's format.
fmt: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Ours and theirs in turn; figures go to benchmarks/results/*.json.
bench: $(VENV)/.installed-bench
	for script in benchmarks/bench_*.py; do $(BIN)/python $$script || exit 1; done

# Train the bundled networks again (same seed): the diffusion model, then the classifier.
train-digits: $(VENV)/.installed-train
	$(BIN)/python training/train_digits.py
	$(BIN)/python training/train_classifier.py

# The virtual environment, made once and again whenever the requirements change.
venv: $(INSTALLED)

# torch goes first and pinned: asking for a plain `torch` may fetch gigabytes of CUDA packages.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch==2.13.0
	$(INSTALL) -e '.[dev]'
	touch $@

# Triton, in whose interpreter the GPU's kernels are tested: a gigabyte that the demo does without.
$(VENV)/.installed-test: $(INSTALLED)
	$(INSTALL) -e '.[cuda]'
	touch $@

$(VENV)/.installed-bench: $(INSTALLED)
	$(INSTALL) -e '.[bench]'
	touch $@

$(VENV)/.installed-train: $(INSTALLED)
	$(INSTALL) -e '.[train]'
	touch $@

# Everything that can be made again, except the virtual environment.
clean:
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
