# One word per chore; each works from a clean checkout and needs only Python, a C compiler and make.
# Variables: PYTHON (which Python to make the environment with), ARGS (passed on to pytest, the bench or the demo).

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet

# What the compiled extensions are made from: a change in one of them builds them again.
SOURCES := pyproject.toml setup.py $(wildcard evbus/*.pyx evbus/*.pxd evbus/*.h)
EXTENSIONS := $(patsubst evbus/%.pyx,evbus.%,$(sort $(wildcard evbus/*.pyx)))
STUBS := $(patsubst %.pyx,%.pyi,$(sort $(wildcard evbus/*.pyx)))

.PHONY: help demo test test-full lint types format build bench sanitize annotate debug clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## /\1 | /' | \
	    while IFS='|' read -r name text; do printf '  make %-10s%s\n' "$$name" "$$text"; done

demo: $(VENV)/.runs  ## watch a server and several clients at work
	$(BIN)/evbus demo $(ARGS)

test: $(VENV)/.tests  ## the default tests
	$(BIN)/pytest $(ARGS)

test-full: $(VENV)/.tests  ## all tests, those too that take long, or need root and Linux; says what it skipped
	$(BIN)/pytest -m "" --timeout 900 -o faulthandler_timeout=850 $(ARGS)

lint: $(VENV)/.develops  ## style, and a build in which any remark of Cython or the C compiler is an error
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	EVBUS_STRICT=1 $(BIN)/python setup.py -q build_ext --build-lib build/strict --build-temp build/strict-temp

types: $(VENV)/.develops $(STUBS)  ## mypy --strict, and every stub against its extension
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest --allowlist .ci/stubtest-allowlist --ignore-unused-allowlist $(EXTENSIONS)

$(STUBS):
	@echo "$@ is missing: every extension ships a stub" >&2; exit 1

format: $(VENV)/.develops  ## rewrite the sources the way `make lint` wants them
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

build: $(VENV)/.develops  ## an sdist, and a wheel made from it, in dist/
	rm -rf dist
	$(BIN)/python -m build

bench: $(VENV)/.benches  ## server CPU per delivery, beside a relay and other brokers
	$(BIN)/python -m bench throughput $(ARGS)

# The sanitizers' build lives in a tree of its own that PYTHONPATH puts before the installed one. Leaks are not looked for
# (the interpreter itself never frees some things), and PYTHONMALLOC=malloc shows each object to the sanitizer.
sanitize: $(VENV)/.tests  ## the tests under AddressSanitizer and UndefinedBehaviorSanitizer (gcc)
	$(INSTALL) 'setuptools>=77' 'Cython>=3.1,<4'
	EVBUS_BUILD=sanitize $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	PYTHONPATH=build/sanitize/lib PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	    EVBUS_TESTED_TREE=build/sanitize/lib $(BIN)/pytest -p no:cacheprovider --timeout 300 $(ARGS)

annotate: $(VENV)/.develops  ## HTML pages in build/cython-annotate that show where C code touches Python
	EVBUS_BUILD=annotate $(BIN)/python setup.py -q build_ext --build-lib build/annotate --build-temp build/annotate-temp
	@ls build/cython-annotate/evbus/*.html

debug: $(VENV)/.tests  ## the tests on a build with C assertions and symbols
	$(INSTALL) 'setuptools>=77' 'Cython>=3.1,<4'
	EVBUS_BUILD=debug $(BIN)/python setup.py -q build --build-base build/debug --build-lib build/debug/lib
	PYTHONPATH=build/debug/lib EVBUS_TESTED_TREE=build/debug/lib $(BIN)/pytest -p no:cacheprovider $(ARGS)

clean:  ## remove everything that make made
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f evbus/*.so evbus/*.c evbus/*.html
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- the virtual environment -----------------------------------------------------------------------------------------
# One environment, filled as far as the chore needs. The package is installed in editable mode, so a changed .py file
# counts at once and only the SOURCES need a build. A fuller stamp vouches for the smaller ones, which saves a build.

$(VENV)/.runs: $(SOURCES) | $(VENV)/.made
	$(INSTALL) -e .
	@touch $@

$(VENV)/.tests: $(SOURCES) | $(VENV)/.made
	$(INSTALL) -e '.[test]'
	@touch $@ $(VENV)/.runs

$(VENV)/.benches: $(SOURCES) | $(VENV)/.made
	$(INSTALL) -e '.[bench]'
	@touch $@ $(VENV)/.runs

$(VENV)/.develops: $(SOURCES) | $(VENV)/.made
	$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.runs $(VENV)/.tests $(VENV)/.benches

$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null || \
	    { echo "evbus needs Python 3.10 or newer; there is no '$(PYTHON)' here. Try: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "evbus needs Python 3.10 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
	           "Try: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@command -v $${CC:-cc} >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null || \
	    { echo "evbus needs a C compiler (cc, gcc or clang). Debian: apt-get install build-essential;" \
	           "macOS: xcode-select --install" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
	    { echo "the C headers of '$(PYTHON)' are missing. Debian: apt-get install python3-dev" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	    { echo "'$(PYTHON)' cannot make virtual environments. Debian: apt-get install python3-venv" >&2; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	@touch $@
