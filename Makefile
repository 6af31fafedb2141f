# Everything a newcomer needs: `make demo` and `make test` set up what they use by themselves.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
WORKERS ?= auto

.PHONY: help demo test test-live test-server lint types types-elsewhere bench bench-quick clean

help:
	@echo "make demo   run the demo: a support desk, three users, five sessions, seen in the terminal"
	@echo "make test   run the tests, several files at a time (WORKERS=0: one after the other)"
	@echo "make test-live   the tests of what arrives, against the Langfuse of LANGFUSE_BASE_URL and its keys"
	@echo "make test-server   the tests on LangGraph's own server (langgraph dev), which they install"
	@echo "make lint   ruff"
	@echo "make types  mypy, strict"
	@echo "make types-elsewhere   pyright on a file of usage, which it installs"
	@echo "make bench  what turntrace costs, next to other tracers, which it installs; writes BENCHMARKS.md (takes long)"
	@echo "make bench-quick   the same, small, with what is installed (under three minutes)"
	@echo "make clean  remove the virtual environment and what tools left"

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

$(VENV)/.app: $(VENV)/.made pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[report]"
	touch $@

$(VENV)/.dev: $(VENV)/.app
	$(BIN)/python -m pip install --quiet --group dev
	touch $@

demo: $(VENV)/.app
	$(BIN)/turntrace demo

# Files of tests side by side: many tests wait for servers and processes, so a worker more than processors is no loss.
test: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 4 --dist loadfile $(ARGS)

test-live: $(VENV)/.dev
	TURNTRACE_LIVE=1 $(BIN)/python -m pytest -m live $(ARGS)

# LangGraph's server holds other packages back, so it is installed beside the others.
$(VENV)-server/.made: pyproject.toml
	$(PYTHON) -m venv $(VENV)-server
	$(VENV)-server/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-server/bin/python -m pip install --quiet --editable . --group dev --group server
	touch $@

test-server: $(VENV)-server/.made
	$(VENV)-server/bin/python -m pytest tests/test_langgraph_server.py $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

# Another type checker, which brings its own runtime, looks at turntrace from outside, as an app would see it.
$(VENV)-types/.made:
	$(PYTHON) -m venv $(VENV)-types
	$(VENV)-types/bin/python -m pip install --quiet --upgrade pip basedpyright
	touch $@

types-elsewhere: $(VENV)/.dev $(VENV)-types/.made
	$(VENV)-types/bin/basedpyright --project tests/pyrightconfig.json --pythonpath $(BIN)/python

# Other tracers bring a hundred packages, so they are installed beside the others.
$(VENV)-bench/.made: pyproject.toml
	$(PYTHON) -m venv $(VENV)-bench
	$(VENV)-bench/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-bench/bin/python -m pip install --quiet --editable . --group dev --group bench
	touch $@

bench: $(VENV)-bench/.made
	$(VENV)-bench/bin/python benchmarks/run.py --markdown BENCHMARKS.md $(ARGS)

bench-quick: $(VENV)/.dev
	$(BIN)/python benchmarks/run.py --quick --json benchmarks/results/quick.json $(ARGS)

clean:
	rm -rf $(VENV) $(VENV)-bench $(VENV)-server $(VENV)-types .pytest_cache .mypy_cache .ruff_cache .hypothesis
