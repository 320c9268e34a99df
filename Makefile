# Every target makes the virtual environment it needs first.  PYTHON is the interpreter to make it
# with; PYTEST_ARGS and BENCH_ARGS are passed on.
PYTHON ?= python3
VENV := .venv
NEWEST := .venv-newest
BIN := $(VENV)/bin

# Plots are written to files, never shown.
export MPLBACKEND := Agg
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PYTEST := JAX_PLATFORMS=cpu $(BIN)/python -m pytest
# Tests compile without optimizations, which is faster, but for those that compile as users do.
AS_USERS := XLA_FLAGS="$(XLA_FLAGS) --xla_backend_optimization_level=3"

.PHONY: demo test test-ci test-slow test-slow-part test-newest interop lint docs bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/jaxopt-compress demo

# Tests, and the examples of docstrings and of the README.
# Tests that share something exclusive (such as the TPU compiler) name an xdist_group.
test: $(VENV)/.installed
	$(PYTEST) -n 2 --dist loadgroup -m "not slow and not ci" --doctest-modules --doctest-glob=README.md \
	  tests jaxopt_compress README.md $(PYTEST_ARGS)

# Kernels step by step, the examples of pages, and other suites whose faults the first line shows in most
# cases, too. Only files with such tests are collected.
test-ci: $(VENV)/.installed
	$(PYTEST) -n 2 --dist loadgroup -m "ci and not slow" --doctest-glob='docs/*.md' \
	  $$(grep -rl --include='*_test.py' 'mark\.ci' tests) docs $(PYTEST_ARGS)

test-slow: $(VENV)/.installed
	$(AS_USERS) $(PYTEST) -n 2 --dist loadgroup -m "slow or ci" tests $(PYTEST_ARGS)

# The part of the slow tests that continuous integration runs: killed saves and flipped bits.
SLOW_PART := tests/storage/safety_test.py tests/storage/damage_test.py

test-slow-part: $(VENV)/.installed
	$(PYTEST) -n 2 --dist loadgroup -m slow $(SLOW_PART) $(PYTEST_ARGS)

# Our files, read by the libraries they are for. These need torch, so they have a place of their own.
interop: .venv-interop/.installed
	@.venv-interop/bin/python -m pip install -qq compressed-tensors==0.20.0 torch==2.13.0
	@.venv-interop/bin/python -m pip install -qq --no-deps --upgrade --target .venv-interop/older compressed-tensors==0.10.2
	JAX_PLATFORMS=cpu .venv-interop/bin/python tests/interop/read_ours.py
	JAX_PLATFORMS=cpu PYTHONPATH=.venv-interop/older .venv-interop/bin/python tests/interop/read_ours.py --sparse

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The documents and the reference as a site, in build/site. A public name without a place in the reference
# is an error, as is a link that leads nowhere.
docs: $(VENV)/.docs
	JAX_PLATFORMS=cpu NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/run.py $(BENCH_ARGS)

# The newest JAX needs a newer Python than the oldest supported one.
test-newest:
	@python=$$(for candidate in python3.13 python3.12 \
	    $$(ls -d "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python3 2>/dev/null | sort -rV); do \
	  "$$candidate" -c 'import ensurepip, venv' 2>/dev/null && echo "$$candidate" && break; done); \
	if [ -z "$$python" ]; then \
	  echo "test-newest: skipped, there is no Python 3.12 or newer on this machine"; \
	else \
	  $(MAKE) --no-print-directory $(NEWEST)/.installed PYTHON="$$python" && \
	  $(AS_USERS) JAX_PLATFORMS=cpu $(NEWEST)/bin/python -m pytest -n 2 --dist loadgroup -m "not slow and not ci" \
	    tests/lift tests/post_training $(PYTEST_ARGS); \
	fi

$(VENV)/.installed: EXTRA := dev
$(NEWEST)/.installed: EXTRA := test
.venv-interop/.installed: EXTRA := coding,examples
%/.installed: pyproject.toml
	@echo "installing into $*"
	@$(PYTHON) -m venv $*
	@$*/bin/python -m pip install -qq --editable ".[$(EXTRA)]"
	@touch $@

$(VENV)/.bench: EXTRA := bench
$(VENV)/.docs: EXTRA := docs
$(VENV)/.bench $(VENV)/.docs: $(VENV)/.installed
	@$(BIN)/python -m pip install -qq --editable ".[$(EXTRA)]"
	@touch $@

clean:
	rm -rf $(VENV) $(NEWEST) .venv-interop .pytest_cache .ruff_cache .hypothesis dist build
