PYTHON ?= python3
BIN := .venv/bin
SHELL := /bin/bash

.PHONY: gpu quickstart test test-slow test-all kills pipelines lint format clean

quickstart: .venv/ready  ## train the shapes pipeline for five minutes and show what it learnt
	$(BIN)/python examples/quickstart.py

test: lint  ## all tests but the slow ones, on all cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadgroup -m "not slow"

test-all: test test-slow  ## all tests

test-slow: .venv/ready  ## the slow tests: the whole matrix of pipelines
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadgroup -m slow

kills: .venv/ready  ## kill trainings again and again, of one process and of two, and compare where they end
	for processes in 1 2; do PYTHONPATH=.:tests OMP_NUM_THREADS=1 \
		$(BIN)/python tests/training/kills.py --kills 50 --processes $$processes || exit 1; done

pipelines: .venv/ready  ## write the table of docs/pipelines.md
	PYTHONPATH=.:tests $(BIN)/python tests/pipeline_table.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf .venv outputs

gpu: .venv/ready  ## on a GPU: whole updates at published sizes, beside the plan of their memory; writes outputs/gpu
	$(BIN)/python benchmarks/step.py --size sd3 --update --output_dir outputs/gpu
	$(BIN)/python benchmarks/step.py --size wan --update --output_dir outputs/gpu
	$(BIN)/python benchmarks/step.py --size flux --update --quantize nf4 --output_dir outputs/gpu
	$(BIN)/python benchmarks/step.py --size qwen --update --quantize nf4 --output_dir outputs/gpu
