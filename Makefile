# make eval: set up and judge the quickstart; make test: set up and run every check that CI runs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: eval demo test lint slow gpu clean

eval: $(READY)
	$(BIN)/ragate eval --testset testsets/quickstart.jsonl --target stored --judge qwen-0.5b-judge

demo: $(READY)
	$(BIN)/ragate eval --testset testsets/llm-serving --target ragate.demo:pipeline --judge qwen-0.5b-judge

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

slow: $(READY)
	$(BIN)/pytest -m slow

gpu:
	PYTHONPATH=.:engine python3 -m pytest -m gpu tests/gpu

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@# the exact version first: a bare `torch` would bring gigabytes of CUDA to a machine without a card
	$(BIN)/python -m pip install --quiet torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install --quiet -e '.[dev]' -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) .ragate .pytest_cache .mypy_cache .ruff_cache
