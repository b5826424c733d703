# The README's commands. They need git, make and Python >= 3.11; PYTHON=... chooses one.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
# The tested versions for this minor version of Python, if there is such a file; otherwise the newest that pyproject.toml allows.
PINNED = $$(f=constraints/py$$($(PY) -c 'import sys; print("%d%d" % sys.version_info[:2])').txt; test -f $$f && echo "--constraint $$f")

.PHONY: quickstart test test-all test-gpu setup lint format docs package

# Trains the student with and without its teacher on the embedded default and writes runs/quickstart/report.html.
quickstart: $(VENV)/.installed
	$(PY) train.py --config=configs/quickstart.py --workdir=runs/quickstart
	@echo "The report: runs/quickstart/report.html"

# The suite, on CPU, in two processes: most of its time is compilation, which runs on one core; test-all adds what takes minutes.
test: setup
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-all: setup
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m ""

# On a GPU: errors of TF32 and bfloat16, golden replay, contracts, quickstart, resumption.
test-gpu: setup
	$(PY) -m tests.on_gpu

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(PY)

format: setup
	$(VENV)/bin/ruff check --fix . && $(VENV)/bin/ruff format .

# Wheel and sdist, into dist/.
package: setup
	rm -rf dist
	$(PY) -m build --no-isolation
	$(PY) -m twine check --strict dist/*

# The site, into site/; a broken link fails.
docs: setup
	$(PY) -m mkdocs build --strict

# What `make test` and the other targets need; the quickstart needs kdjax alone.
setup: $(VENV)/.ready

$(VENV)/.ready: $(VENV)/.installed
	$(PIP) $(PINNED) --editable '.[dev]'
	touch $@

$(VENV)/.installed: pyproject.toml $(wildcard constraints/*.txt)
	@test -n "$(PYTHON)" || { echo "kdjax needs Python 3.11 or newer; none was found. PYTHON=/path/to/python chooses one."; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) $(PINNED) --editable .
	touch $@
