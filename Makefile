# Everything runs in .venv, made from requirements.lock: make demo, make test, make lint, make bench, make clean.
# PYTHON=python3.12 chooses the interpreter; PYTEST_ARGS='tests/test_flags.py -x' the tests, which are otherwise all but
# the slow ones; make test-all leaves none out.

PYTHON ?= python3
PYTEST_ARGS ?= -m 'not slow'
BIN := .venv/bin
INSTALLED := .venv/requirements.lock

.PHONY: demo test test-all lint format bench clean .venv

demo: $(INSTALLED)
	$(BIN)/python -m utils.demo

test: $(INSTALLED)
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 --dist loadgroup $(PYTEST_ARGS)

test-all: PYTEST_ARGS =
test-all: test

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix --exit-zero --quiet .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.suite

.venv: $(INSTALLED)

# A copy of the lock file marks a finished installation: a lock file that is newer but the same installs nothing.
# --no-deps because the lock file is complete, and on Python 3.13 leaves out a package that nothing here uses;
# --no-compile because half of the installation would go into byte code of modules that are never imported.
$(INSTALLED): requirements.lock
	@cmp -s $< $@ || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "Python 3.11 or newer is needed and $(PYTHON) is older: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }; \
	  echo "Installing the requirements into .venv (about a minute, once)"; \
	  rm -f $@; \
	  $(PYTHON) -m venv .venv && \
	  $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-compile -r $<; } \
	  && cp $< $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
