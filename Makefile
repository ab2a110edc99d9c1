# make demo   the main job end to end, on the CPU, in less than two minutes after installation
# make test   every test that this machine can run
# make check  ruff and mypy --strict
# make bench  the quick benchmarks
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test check bench clean

demo: $(VENV)/.runtime
	$(RUN) -m edge.command demo

test: $(VENV)/.dev
	$(RUN) -m pytest

check: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(VENV)/.dev
	$(RUN) -m benchmarks.coil_maps
	$(RUN) -m benchmarks.intake
	$(RUN) -m benchmarks.peers --quick
	$(RUN) -m benchmarks.quality --quick
	$(RUN) -m benchmarks.stability --seeds 1

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/pip install --disable-pip-version-check -q -e .
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/pip install --disable-pip-version-check -q -e '.[test,dev]'
	touch $@ $(VENV)/.runtime

clean:
	rm -rf $(VENV) build demo *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
