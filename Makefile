# make test    set up a virtual environment, build, lint and run every test
# make docs    set up, then build the documentation's site in build/site
# make demo    set up, then train plain, Stimulative Training and GKT on a small real data set
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Progress bars on a terminal, our own lines elsewhere.
PIP = $(BIN)/python -m pip install $(shell test -t 2 || echo --quiet) --disable-pip-version-check --constraint constraints.txt
NATIVE_SOURCES = $(shell find csrc kernels -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.cmake')
FORMATTED_SOURCES = $(shell find csrc kernels python_tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: test lint docs demo bench clean

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED_SOURCES)

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

demo: $(VENV)/.installed-bench
	$(BIN)/python examples/demo.py

bench: $(VENV)/.installed-bench
	$(BIN)/python bench/throughput.py

$(VENV)/.installed: pyproject.toml setup.py CMakeLists.txt constraints.txt $(NATIVE_SOURCES)
	@echo "Setting up $(VENV): torch is downloaded and the native module built, which takes minutes the first time."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

# What an extra needs beside the package, which is built once.
$(VENV)/.installed-%: $(VENV)/.installed
	@echo "Installing what '$*' needs beside the package."
	$(PIP) "gkt_fast[$*]"
	touch $@

clean:
	rm -rf $(VENV) build demo *.egg-info gkt_fast/_native*.so
