PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test fast lint test-versions clean

# The main job: from a real table to a trained model, its samples, scores and figures in out/.
demo: $(VENV)/demo
	OMP_NUM_THREADS=1 $(BIN)/python examples/table.py

# Everything that must hold, linters first.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_OPTIONS)

# What can be known in two minutes.
fast: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(PYTEST_OPTIONS)

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The fast suite with the lowest versions that pyproject.toml admits, and with the newest.
test-versions: $(VENV)-lowest/test $(VENV)-newest/test
	for versions in lowest newest; do \
	  OMP_NUM_THREADS=1 $(VENV)-$$versions/bin/python -m pytest -n 2 --dist worksteal \
	    -m "not slow" $(PYTEST_OPTIONS) || failed=1; \
	done; test -z "$$failed"

$(VENV)-lowest/test: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet -c constraints-lowest.txt -e ".[test]"
	touch $@

$(VENV)-newest/test: pyproject.toml
	$(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet --upgrade -e ".[test]"
	touch $@

$(VENV)/demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[plot]" scikit-learn
	touch $@

$(VENV)/test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-newest out build dist *.egg-info
