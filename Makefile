# `make help` lists the targets. PYTHON picks the interpreter that makes .venv. TORCH_ARGS goes to pip with torch: on
# Linux without a GPU, PyTorch's own CPU index saves gigabytes (README.md, "Try it").
PYTHON ?= python3
TORCH_ARGS ?=
BIN := .venv/bin
# The original LLaVA package wants versions of its own, and Python 3.11 or older.
LLAVA_PYTHON ?= python3.11
LLAVA := .venv-llava/bin
# Test files go to two processes, one thread each: more threads than cores make torch many times slower.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
SIDE_BY_SIDE := -n $(JOBS) --dist loadfile --no-loadscope-reorder
QUICK := tests/test_rooms.py tests/data tests/methods tests/sculpt tests/tasks
QUICK += --ignore=tests/methods/test_edits.py --ignore=tests/sculpt/test_fused.py
QUICK += --ignore=tests/sculpt/test_partitioned.py --ignore=tests/tasks/test_documented_tree.py
.DEFAULT_GOAL := help
.PHONY: help setup setup-dev demo check test test-slow test-all test-gpu gpu-report attack parity lint docs bench tiny-model clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: $(BIN)/.ready  ## make .venv with what training and evaluation need

setup-dev: $(BIN)/.ready-dev  ## the same with DeepSpeed, bitsandbytes, pycocoevalcap, the test tools and the linters

$(BIN)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	# torch alone first, so that nothing else decides which build of it comes.
	$(BIN)/python -m pip install --quiet -c constraints.txt torch $(TORCH_ARGS)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(BIN)/.ready-dev: $(BIN)/.ready
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: setup  ## zero-shot, LoRA and LoRASculpt on tiny IconQA
	bash scripts/demo.sh

check: lint  ## while working: lint, types and the quickest tests (a minute on two cores)
	# In one process: for so few tests two would spend their time on imports.
	$(PYTEST) $(QUICK)

test: setup-dev  ## the fast tests (at most 10 minutes on two cores)
	$(PYTEST) $(SIDE_BY_SIDE)

test-slow: setup-dev $(LLAVA)/.ready  ## the slow ones: engines, kills, the original LLaVA package
	$(PYTEST) $(SIDE_BY_SIDE) -m slow

test-all: setup-dev $(LLAVA)/.ready  ## every test in one go (about an hour on two cores)
	$(PYTEST) $(SIDE_BY_SIDE) -m ""

test-gpu: setup-dev  ## the tests that a GPU is for, on one (every other test runs on the CPU)
	$(BIN)/python -m pytest --gpu

gpu-report: setup-dev  ## what only a GPU can tell, in 9 minutes on one card: benchmarks/gpu/CARD_DATE.json and .md
	$(BIN)/python benchmarks/gpu_report.py

attack: setup-dev  ## damaged inputs at random, kills, two commands at once: 300 s for each kind of input (an hour)
	$(PYTEST) tests/attack --attack-seconds 300
	$(BIN)/python -m tests.attack.kills --events 100 --random 50
	$(BIN)/python -m tests.attack.pairs --pairs 53

parity: setup-dev $(LLAVA)/.ready  ## compare with the original LLaVA package, in an environment of its own (1.2 GB)
	$(PYTEST) -m "" tests/llava_patch

$(LLAVA)/.ready: constraints-llava.txt
	$(LLAVA_PYTHON) -m venv .venv-llava
	$(LLAVA)/python -m pip install --quiet --upgrade "pip>=24" wheel "setuptools<81"
	$(LLAVA)/python -m pip install --quiet torch==2.13.0 $(TORCH_ARGS)
	$(LLAVA)/python -m pip install --quiet --no-deps llava-torch==1.2.2.post1
	$(LLAVA)/python -m pip install --quiet -r constraints-llava.txt
	$(LLAVA)/python -c "import llava.train.train"
	touch $@

lint: setup-dev  ## ruff, mypy, YAML and shell scripts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/check_files.py

docs: setup  ## docs/ and the report as a site, in site/ (a broken link is an error)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

bench: setup  ## speed and memory as ratios against named baselines
	$(BIN)/python benchmarks/cmr.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/evaluation.py

tiny-model: setup  ## rebuild data/tiny_llava (about half an hour on two cores)
	$(BIN)/python -m llava_sculpt.tiny.pretraining.pretrain --out data/tiny_llava

clean:  ## remove generated data, runs and caches (not .venv and .venv-llava)
	rm -rf runs data/tiny build site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
