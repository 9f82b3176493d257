# Two commands on a fresh machine with Python 3.11, 3.12 or 3.13: `make quickstart` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check \
  $(if $(TORCH),--extra-index-url https://download.pytorch.org/whl/$(TORCH))

# Two workers, one thread each: threads that wait for each other's cores cost most of the time.
# The run ends if a worker crashes: xdist hangs if it replaces a crashed worker.
PYTEST := -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

.PHONY: help quickstart test test-busy test-lowest test-newest docs lint format clean

help:
	@echo "make quickstart   few labels, with and without a teacher: a table, a picture, a page"
	@echo "make test         lint, then the whole test suite"
	@echo "make test-busy    the suite three times in random order, on one core with two busy processes"
	@echo "make test-lowest  the suite with the lowest versions setup.cfg allows, on Python 3.11"
	@echo "make test-newest  the suite with the newest versions, on Python 3.13"
	@echo "make docs         generate the reference pages, draw the diagrams, build the site in site/"
	@echo "make format       format the code"
	@echo "make clean        remove the environments (runs in checkpoints/ are kept)"
	@echo
	@echo "PYTHON=...        the interpreter to use (default: $(PYTHON); 3.11 and 3.13 as above)"
	@echo "VENV=...          the folder of the environment (default: .venv)"
	@echo "TORCH=cpu         at the first installation: the smaller build of PyTorch, for CPUs only"
	@echo "SEEDS='1 2 3'     seeds of the random orders; CORE=0: the core of test-busy"

# One stamp for each set of packages: they are installed again only if setup.cfg or pyproject.toml changed.
$(VENV)/quickstart.stamp: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 11) and \
	  f"deit needs Python 3.11 to 3.13, this is {v[0]}.{v[1]}; try: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch and friends into $(VENV) (some GB, a few minutes, only once)"
	$(INSTALL) -e '.[digits,plot]'
	@touch $@

$(VENV)/test.stamp: $(VENV)/quickstart.stamp
	$(INSTALL) -e '.[dev]'
	@touch $@

# The text comes before the installation, so that nobody waits without knowing for what.
quickstart:
	@echo "Of 1295 training images of handwritten digits, 65 have labels. A teacher (a ConvNet) learns"
	@echo "from these. A small vision transformer learns from the teacher's outputs for all images;"
	@echo "for comparison, the same transformer learns from the 65 labels alone. Both transformers"
	@echo "are trained with 3 seeds. First torch and other packages are installed into $(VENV) (some GB,"
	@echo "a few minutes, only once). Nothing else is downloaded. The training takes about 4 minutes on 2 idle cores."
	@$(MAKE) --no-print-directory $(VENV)/quickstart.stamp
	$(BIN)/deit compare digits-few-labels --seeds 0,1,2 --parallel 2 --out checkpoints/quickstart
	$(BIN)/deit report checkpoints/quickstart --out checkpoints/quickstart-report --force
	@echo; echo "Open checkpoints/quickstart-report/index.html (all results) and"
	@echo "checkpoints/quickstart/runs.png (the picture)."
	@echo "To run deit and python from this environment: source $(BIN)/activate"

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

# Tests that depend on their order or on time fail here sooner or later. Linux only (taskset).
SEEDS ?= 1 2 3
CORE ?= 0

test-busy: $(VENV)/test.stamp
	@trap 'kill $$busy' EXIT; \
	for _ in 1 2; do taskset -c $(CORE) sh -c 'while :; do :; done' & busy="$$busy $$!"; done; \
	for seed in $(SEEDS); do \
	  OMP_NUM_THREADS=1 taskset -c $(CORE) $(BIN)/python $(PYTEST) \
	    --random-order --random-order-seed=$$seed || exit; \
	done

# The supported versions: each in a separate environment, built from nothing every time, since an
# existing one would not have the newest versions. uv is installed from PyPI.
# The interpreter is PYTHON if set; otherwise that version on the path or of pyenv; otherwise uv's.
interpreter = $(if $(filter file,$(origin PYTHON)),$(shell \
  for python in python$(1) $$HOME/.pyenv/versions/$(1).*/bin/python; do \
    "$$python" -c 'import sys; print(sys.executable)' 2> /dev/null && exit; done; echo $(1)),$(PYTHON))

.venv-uv/bin/uv:
	$(PYTHON) -m venv .venv-uv
	.venv-uv/bin/python -m pip install --quiet --disable-pip-version-check uv

test-lowest test-newest: test-%: .venv-uv/bin/uv
	.venv-uv/bin/uv venv --quiet --clear --seed --python $(call interpreter,$(VERSION)) .venv-$*
	@echo "installing torch and friends into .venv-$* (some GB, a few minutes)"
	.venv-uv/bin/uv pip install --quiet --python .venv-$*/bin/python \
	  --resolution $(RESOLUTION) -e '.[dev]'
	OMP_NUM_THREADS=1 .venv-$*/bin/python $(PYTEST)

test-lowest: RESOLUTION := lowest-direct
test-lowest: VERSION := 3.11
test-newest: RESOLUTION := highest
test-newest: VERSION := 3.13

docs: $(VENV)/test.stamp
	$(BIN)/python scripts/diagrams.py
	$(BIN)/python scripts/docs.py build
	@echo "to read it: python -m http.server --directory site"

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python scripts/lint_imports.py
	$(BIN)/python scripts/lint_sizes.py
	$(BIN)/python scripts/lint_words.py

format: $(VENV)/test.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-uv .venv-lowest .venv-newest
