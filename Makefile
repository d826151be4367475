# `make demo` trains and measures a policy; `make test` runs the checks; `make test-oldest` runs those that depend on
# transformers and its neighbours, with the oldest that setup.cfg allows (.ci/oldest.txt). Each installs what it needs, into
# .venv or .venv-oldest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OLDEST := .venv-oldest
OLDEST_INSTALLED := $(OLDEST)/.installed
OLDEST_TESTS := $(addprefix tests/,configuration conversion hub inference modeling parity processing training test_auto.py)

.PHONY: demo test test-oldest lint format clean

demo: $(INSTALLED)
	$(BIN)/manipulators train act_metaworld --output outputs/demo

test: lint
	$(BIN)/python -m pytest -q --numprocesses 2

test-oldest: $(OLDEST_INSTALLED)
	$(OLDEST)/bin/python -m pytest -q --numprocesses 2 $(OLDEST_TESTS) -k "not (compile or traced or export or every_tensor)"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Made again when the requirements change.
$(INSTALLED): setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off --editable ".[sim,dev]"
	touch $(INSTALLED)

$(OLDEST_INSTALLED): setup.cfg pyproject.toml .ci/oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --progress-bar off \
		--constraint .ci/oldest.txt --editable ".[sim,dev]"
	touch $(OLDEST_INSTALLED)

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info
