# Every target makes and uses .venv/; nothing has to be installed before but Python 3.11 with venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test chromium check bench sample-runs soak docs dictionary format clean

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(READY) ## Train a small model with a learning-rate spike, watch it, write runs/demo/report.html
	$(BIN)/entropylens demo

# The tests in a browser use Debian's; without it they are left out, which CI does not allow.
chromium:
	@command -v chromium > /dev/null || { test "$$(id -u)" = 0 && command -v apt-get > /dev/null && \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core \
	  > /dev/null; } || echo "no chromium: the tests in a browser are left out"

test: $(READY) chromium ## Run the tests
	$(BIN)/python -m pytest -n 2 --dist loadgroup

check: $(READY) chromium ## Everything CI runs: format, lint, types, import contracts, tests, docs, wheel
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2 --dist loadgroup --doctest-modules tests entropylens callbacks dashboard
	$(MAKE) docs
	rm -rf dist && $(BIN)/python -m build --no-isolation . > /dev/null
	$(BIN)/check-wheel-contents dist/*.whl

docs: $(READY) ## Build the documentation, warnings as errors
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

bench: $(READY) ## Run every benchmark at its full size
	for script in benchmarks/*.py; do $(BIN)/python -m benchmarks.$$(basename $$script .py) || exit 1; done

sample-runs: $(READY) ## Train those sample runs that are not finished
	for run in collapse destroyed adaptive small; do \
	  $(BIN)/python sample_runs/grpo_countdown/train.py --run $$run || exit 1; done
	$(BIN)/python sample_runs/fashion_overfit/run.py

soak: $(READY) ## The long proofs
	$(BIN)/python -m pytest -m soak tests

dictionary: $(READY) ## Regenerate the metric dictionary from the registered diagnostics
	$(BIN)/python -c "from entropylens.registry import write_dictionary; write_dictionary()"

format: $(READY) ## Format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove what the other targets made
	rm -rf $(VENV) dist build docs/_build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
