# make demo | test | setup | dev | bench | full-size | overfit | lint      (VIDEOS=folder points the demo at one's own videos)
# What each is for: CONTRIBUTING.md
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FRESH := .venv.constraints
ENV := . ./env.sh &&

.PHONY: demo test setup dev bench full-size overfit lint format constraints free-slots clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(ENV) python -m fw_pipeline.demo.run $(if $(VIDEOS),--videos "$(VIDEOS)")

# Two workers of one thread each, a file to a worker: the fastest on two cores. PYTEST_ARGS="-k dataset" picks some.
test: setup
	$(ENV) OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

dev: setup
	$(ENV) dagster dev -w workspace.yaml

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Newest versions in pyproject.toml's ranges, from a fresh venv, into constraints.txt. What stands above its line "# Below" stays.
# A build's own suffix (2.13.0+cpu) and CUDA's wheels are left out, so that the list fits every machine.
constraints:
	rm -rf $(FRESH) && $(PYTHON) -m venv $(FRESH)
	sed '/^# Below/q' constraints.txt > $(FRESH)/kept.txt
	$(FRESH)/bin/pip install -q -c $(FRESH)/kept.txt -e '.[dev,gpu,remote]'
	$(FRESH)/bin/pip freeze --exclude-editable > $(FRESH)/found.txt
	sed -E 's/\+[a-z0-9.]+$$//; /^(nvidia-|cuda-|triton)/d' $(FRESH)/found.txt | grep -vxFf $(FRESH)/kept.txt > $(FRESH)/new.txt
	cat $(FRESH)/kept.txt $(FRESH)/new.txt > constraints.txt
	rm -rf $(FRESH)

# The tiny preset learns one rendered clip by heart: proof that losses, targets and heads work here. A minute or two.
overfit: setup
	$(ENV) python -m fw_pipeline.demo.overfit

bench: setup
	for file in benchmarks/bench_*.py; do $(BIN)/python $$file --quick || exit 1; done

# The real 1.3B configuration with seeded weights: an optimizer step of each stage in 20 GiB of ordinary memory.
full-size: setup
	$(ENV) python -m fw_model.describe.full_size

# A command-line run that was killed with SIGKILL keeps its pool slot; this frees the slots of runs that have ended.
free-slots: setup
	$(ENV) python -m fw_pipeline.free_slots $(RUN)

clean:
	rm -rf data dagster_home/{storage,history,schedules,logs,.telemetry,.logs_queue} .pytest_cache .mypy_cache .ruff_cache
