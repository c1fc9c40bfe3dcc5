# Two commands do everything: `make book` and `make test`. Both set up first; neither needs
# anything but Python 3.11+, make and pip's package index.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input
STAMP := $(VENV)/.installed

# Chapters that show published weights skip the download unless it is asked for:
# `make book HF_HUB_OFFLINE=0`.
export HF_HUB_OFFLINE ?= 1
# The models of the chapters are too small to gain from a second thread, and on a busy core two
# threads wait for each other: several times slower than one.
export OMP_NUM_THREADS ?= 1
# Nothing that runs here counts as a learner's work.
export MODERNBERT_PROGRESS := off

.DEFAULT_GOAL := help
.PHONY: help book test pdf browser colab lint sync address costs tuned workshop rehearse clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

# torch goes first: what installs after it then finds it there and asks for no other build.
$(STAMP): pyproject.toml .ci/constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.12 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c .ci/constraints.txt torch
	$(PIP) -c .ci/constraints.txt -e '.[test]'
	@touch $@

book: $(STAMP)  ## execute every chapter and build the HTML, warnings as errors
	PYTHONPATH=tests $(BIN)/python -m tools.book

pdf: $(STAMP)  ## print the book that `make book` built as one PDF (needs Chromium)
	$(PIP) -c .ci/constraints.txt -e '.[browser]'
	PYTHONPATH=tests $(BIN)/python -m tools.pdf

browser: $(STAMP)  ## open the book that `make book` built in Chromium and test it there
	$(PIP) -c .ci/constraints.txt -e '.[browser]'
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=10 tests/test_browser.py tests/test_live_model.py tests/test_pdf.py

colab: $(STAMP)  ## run the notebooks as Colab does: make colab COLAB='--gpu 08 09' for some
	PYTHONPATH=tests $(BIN)/python -m tools.colab $(COLAB)

lint: $(STAMP)  ## ruff and codespell, the fast part of `make test`
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell book notebooks modernbert_mini tests *.md *.toml *.yml Makefile .github

test: lint book  ## everything CI runs: lint, every notebook, the book, unit, parity and doc tests
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=10 tests

sync: $(STAMP)  ## rewrite the `package` cells of the notebooks from the package
	$(BIN)/python tests/tools/sync.py

address: $(STAMP)  ## set the repository's address: make address URL=https://github.com/you/repo
	$(BIN)/python tests/tools/address.py $(URL)

costs: $(STAMP)  ## build the book, and record what its chapters cost
	PYTHONPATH=tests $(BIN)/python -m tools.book --record

tuned: $(STAMP)  ## fine-tune mini for the five tasks, and record what it reaches
	PYTHONPATH=tests $(BIN)/python -m tools.fine_tuned

workshop: $(STAMP)  ## notebooks and an offline bundle for teaching; WHEELS=1 downloads the wheels
	PYTHONPATH=tests $(BIN)/python -m tools.workshop $(if $(WHEELS),--wheels)

rehearse: $(STAMP)  ## the same, and run every student notebook from top to bottom
	PYTHONPATH=tests $(BIN)/python -m tools.workshop --rehearse

clean:  ## remove what the builds made, the environment too
	rm -rf $(VENV) _build .cache .pytest_cache .ruff_cache build *.egg-info
	find modernbert_mini tests notebooks -name __pycache__ -prune -exec rm -rf {} +
