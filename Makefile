# Two commands on a fresh machine with Python 3.11 or 3.12: `make quickstart` and `make test`.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help quickstart test lint format clean

help:
	@echo "make quickstart   train teacher, distilled and undistilled student on digits; one table"
	@echo "make test         lint, then the whole test suite"
	@echo "make format       format the code"
	@echo "make clean        remove .venv (runs in checkpoints/ stay)"

# One stamp for each set of packages: nothing is installed again while setup.cfg stays as it is.
.venv/quickstart.stamp: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 11) and \
	  f"deit needs Python 3.11 or 3.12, this is {v[0]}.{v[1]}; try: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing torch and friends into .venv (some GB, a few minutes, only once)"
	$(INSTALL) -e '.[digits,plot]'
	@touch $@

.venv/test.stamp: .venv/quickstart.stamp
	$(INSTALL) -e '.[dev]'
	@touch $@

quickstart: .venv/quickstart.stamp
	$(BIN)/deit compare digits --out checkpoints/quickstart
	@echo; echo "To type these as they stand: source .venv/bin/activate"

# Two at a time, one thread each: threads that wait for each other's cores cost most of the time.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/test.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv
