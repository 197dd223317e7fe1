# Two commands do everything, set-up included: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
PIP := --quiet -c constraints.txt
# the lowest transformers that pyproject.toml allows, in a virtual environment of its own
FLOOR := .venv-floor
LOWEST := $(shell sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)
# what the installation compiles; editing it installs again
KERNELS := setup.py $(wildcard src/expertly/kernels/cpu/*.cpp src/expertly/kernels/cpu/*.h)
# the tools of the virtual environment where there is one, else those on the PATH
BIN := $(if $(wildcard $(VENV)/bin/pytest),$(VENV)/bin/,)
# a process for each processor, but not more than fit into memory at 1 GB each; they take each
# other's tests when they have none left. WORKERS= runs all in one
WORKERS ?= -n logical --maxprocesses 4 --dist worksteal

.PHONY: demo test check stress floor gpu clean

demo: $(VENV)/runtime  ## train a small MoE and its dense twin on real text, and compare them
	$(VENV)/bin/expertly demo

test: $(VENV)/dev  ## set up and run every check
	$(MAKE) check

check:  ## every check, with the tools that are there
	$(BIN)ruff check .
	$(BIN)ruff format --check .
	$(BIN)lint-imports
	$(BIN)mypy
	$(BIN)pytest $(WORKERS)

stress: $(VENV)/dev  ## the heavy fault rows in full: kills, full disks, mutants; some ten minutes
	{ echo 'count(sample, full): how many are tried by make test, and here'; \
		grep -rno 'count([0-9_]*, [0-9_]*)' tests; echo; } > docs/stress.log
	$(VENV)/bin/pytest -o addopts=-q --stress --disable-warnings -rap --durations=0 \
		tests/faults tests/train/test_train_rebalance.py >> docs/stress.log; \
		status=$$?; tail -3 docs/stress.log; exit $$status

floor: $(FLOOR)/dev  ## the families with the lowest supported transformers
	$(FLOOR)/bin/pytest tests/test_families.py tests/models/test_models_decorated.py

gpu:  ## what needs a GPU, with the interpreter that is there and no network
	PYTHONPATH=src $(PYTHON) -m pytest -m gpu tests
	PYTHONPATH=src $(PYTHON) benchmarks/step_cost.py --width 2048 model.hidden_size=512 schedule.bf16=true
	PYTHONPATH=src $(PYTHON) benchmarks/speed_to_loss.py --gpu

clean:  ## remove what make made; runs stay
	rm -rf $(VENV) $(FLOOR) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

%/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "expertly needs Python 3.11 or newer: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $*

$(VENV)/runtime: pyproject.toml constraints.txt $(KERNELS) | $(VENV)/bin/python
	$(VENV)/bin/pip install $(PIP) -e .
	touch $@

$(VENV)/dev: pyproject.toml constraints.txt $(KERNELS) | $(VENV)/bin/python
	$(VENV)/bin/pip install $(PIP) -e '.[dev]'
	touch $@

$(FLOOR)/dev: pyproject.toml constraints.txt $(KERNELS) | $(FLOOR)/bin/python
	sed '/^transformers==/d' constraints.txt > $(FLOOR)/constraints.txt
	$(FLOOR)/bin/pip install --quiet -c $(FLOOR)/constraints.txt -e '.[dev]' transformers==$(LOWEST)
	touch $@
