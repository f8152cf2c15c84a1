# Two commands do everything, set-up included: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.solera-ready
# Test processes; each holds its own torch, so one a core.
JOBS   ?= 2

.PHONY: setup demo test check bench bench-merge bench-moe clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   the main job, offline, on a laptop      make test   all tests"
	@echo "make check  lint, types, layers                     make bench  speed and memory, with peers"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("solera needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $(READY)

# Exit codes 1 and 2 are the gate's FAIL and INCONCLUSIVE: results. 3, 4, 70 (a bug of solera) and 130 are errors.
demo: setup
	@$(BIN)/solera demo; code=$$?; [ $$code -le 2 ]

test: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/test_floors.py tests/test_imports.py

# The whole table for merging: half an hour, 20 GB of disk. Options: see bench/merge.py --help.
bench-merge: setup
	$(BIN)/python bench/merge.py --start
	$(BIN)/python bench/merge.py --size mid --rounds 1
	$(BIN)/python bench/merge.py --size big --methods linear slerp ties dare_ties
	$(BIN)/python bench/merge.py --size big --methods linear --no-peer --cap 512
	$(BIN)/python bench/merge.py --small-tensors

# Mixtures of real fine-tunes beside everything else made of the same specialists. DATA holds the text and the 260K Llama
# (see bench/moe_text.py); WORK is kept, so that a second start goes on where the first one stopped.
DATA ?= ../shared/data
WORK ?= runs/bench-moe
bench-moe: setup
	$(BIN)/python bench/moe.py --shared $(DATA) --work $(WORK) --seeds 0 1 2 --jobs $(JOBS)
	$(BIN)/python bench/moe.py --shared $(DATA) --work $(WORK) --size large --seeds 0 --jobs $(JOBS)
	$(BIN)/python bench/moe_build.py

bench: setup
	$(BIN)/python bench/start.py
	$(BIN)/python bench/merge.py --methods linear ties --rounds 1
	$(BIN)/python bench/distill.py

clean:
	rm -rf runs dist build .mypy_cache .ruff_cache .hypothesis
