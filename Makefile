# make demo   the main job end to end, on the CPU, in less than two minutes after installation
# make test   every test that this machine can run
# make check  ruff and mypy --strict
# make bench  the quick benchmarks; records and pictures in build/bench
PYTHON ?= python3
VENV := .venv
BENCH := build/bench
RUN := $(VENV)/bin/python

.PHONY: demo test check bench clean

demo: $(VENV)/.runtime
	$(RUN) -m edge.command demo

# Two at a time, each with one thread a matrix product: those of two would wait for each other.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile

check: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(VENV)/.dev
	mkdir -p $(BENCH)
	$(RUN) -m benchmarks.latency --quick --json $(BENCH)/latency.json --png $(BENCH)/latency.png
	$(RUN) -m benchmarks.throughput --quick --json $(BENCH)/throughput.json --png $(BENCH)/throughput.png
	$(RUN) -m benchmarks.load --quick --json $(BENCH)/load.json --png $(BENCH)/load.png
	$(RUN) -m benchmarks.intake --lengths 2000 5000 --json $(BENCH)/intake.json
	if $(RUN) -c 'import onnx'; then \
		$(RUN) -m benchmarks.roofline --quick --json $(BENCH)/roofline.json --png $(BENCH)/roofline.png; fi
	if command -v bart && command -v ismrmrd_generate_cartesian_shepp_logan; then \
		$(RUN) -m benchmarks.coil_maps --size 128 --repeats 3 --json $(BENCH)/coil_maps.json && \
		$(RUN) -m benchmarks.peers --quick --data none --json $(BENCH)/peers.json --png $(BENCH) && \
		$(RUN) -m benchmarks.quality --quick --json $(BENCH)/quality.json; fi
	$(RUN) -m benchmarks.stability --seeds 1 --json $(BENCH)/stability.json

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
