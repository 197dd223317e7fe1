# Two commands do everything, set-up included: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
PIP := --quiet -c constraints.txt
# the tools of the virtual environment where there is one, else those on the PATH
BIN := $(if $(wildcard $(VENV)/bin/pytest),$(VENV)/bin/,)

.PHONY: demo test check stress gpu clean

demo: $(VENV)/runtime  ## train a small MoE and its dense twin on real text, and compare them
	$(VENV)/bin/expertly demo

test: $(VENV)/dev  ## set up and run every check
	$(MAKE) check

check:  ## every check, with the tools that are there
	$(BIN)ruff check .
	$(BIN)ruff format --check .
	$(BIN)lint-imports
	$(BIN)mypy
	$(BIN)pytest

stress: $(VENV)/dev  ## the heavy fault rows in full: kills, full disks, mutants; some ten minutes
	{ echo 'count(sample, full): how many are tried by make test, and here'; \
		grep -rno 'count([0-9_]*, [0-9_]*)' tests; echo; } > docs/stress.log
	$(VENV)/bin/pytest -o addopts=-q --stress --disable-warnings -rap --durations=0 \
		tests/faults tests/train/test_train_rebalance.py >> docs/stress.log; \
		status=$$?; tail -3 docs/stress.log; exit $$status

gpu:  ## what needs a GPU, with the interpreter that is there and no network
	PYTHONPATH=src $(PYTHON) -m pytest -m gpu tests
	PYTHONPATH=src $(PYTHON) benchmarks/step_time.py schedule.bf16=true

clean:  ## remove what make made; runs stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "expertly needs Python 3.11 or newer: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/runtime: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/pip install $(PIP) -e .
	touch $@

$(VENV)/dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/pip install $(PIP) -e '.[dev]'
	touch $@
