# Needs make, git and Python 3.11 or later; everything else is installed into .venv.
# Another interpreter: make PYTHON=/path/to/python3.13. Where packages come from is pip's business.

PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Figures are drawn by the notebooks' own backend, whatever the shell says.
unexport MPLBACKEND
# Chapters run without your personal IPython settings, progress bars, and the kernel's warnings
# about its own debugger and transport, which mean nothing here.
export PYDEVD_DISABLE_FILE_VALIDATION := 1
export TQDM_DISABLE := 1
export IPYTHONDIR := $(CURDIR)/_build/ipython
# The chapters are stored, and tested, as they run on digits, also where there is a GPU.
export APL_PROTOCOL ?= digits
KERNEL := _build/ipython/profile_default/ipython_kernel_config.py

.DELETE_ON_ERROR:
.PHONY: help book pdf test notebooks address clean

help: ## say what can be made
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'This project needs Python 3.11 or later; name one with "make PYTHON=/path/to/python3".' >&2; exit 1; }
	@echo 'Installing the environment into $(VENV). The first time this downloads torch.'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

$(KERNEL):
	@mkdir -p $(@D)
	@echo 'get_config().IPKernelApp.log_level = "ERROR"' > $@

book: $(INSTALLED) $(KERNEL) ## execute the chapters and render the book into _build/html
	@$(BIN)/python book/tools/build.py

pdf: $(INSTALLED) ## typeset the stored chapters with LaTeX: _build/pdf/normalized-losses.pdf
	@$(BIN)/python book/tools/build.py --pdf

test: $(INSTALLED) $(KERNEL) ## everything that is checked: style, types, units, chapters, rendering
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest -n auto --maxprocesses 4
	# Chapters: every cell runs, and cells tagged nbval-check-output give what is stored; with the
	# wheel, in an environment of its own, from an empty folder outside the repository.
	$(BIN)/python book/tools/outside.py
	$(BIN)/python book/tools/build.py --stored
	# The pages just rendered, in Chromium: the system's, or `playwright install chromium`; and
	# the PDF, where there is TeX.
	$(BIN)/pytest -q tests/browser

notebooks: $(INSTALLED) $(KERNEL) ## execute every chapter in place and store it with its outputs
	@$(BIN)/ruff check --quiet --fix book
	@$(BIN)/ruff format --quiet book
	@$(BIN)/python book/tools/store.py

address: $(INSTALLED) ## put the public address everywhere: URL=https://github.com/OWNER/NAME
	@$(BIN)/python book/tools/address.py $(if $(filter command,$(origin URL)),'$(URL)')

clean: ## remove what was built, but not the environment
	rm -rf _build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
