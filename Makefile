# The verbs of this project. PYTHON and VENV may be set; nothing outside the tree is changed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0

.PHONY: help demo test test-lowest lint guard fuzz sanitize races crash mutants bench gpu gpu-build gpu-check gpu-test gpu-bench docs clean
help:
	@echo "make demo | test | test-lowest | lint | guard | fuzz | sanitize | races | crash |"
	@echo "     mutants | bench | gpu | docs | clean"

$(VENV)/.installed: pyproject.toml setup.py csrc/bindings.cpp $(wildcard csrc/*.h csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "$(TORCH)"
	$(BIN)/pip install -q -e ".[dev,demo]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/beft-ext demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest tests

# With the lowest versions that pyproject.toml allows, where they matter; torch stays that of the
# environment. datasets asks for a newer pyarrow than we do.
LOWEST = $(VENV)/lowest
BROAD = tests/tasks/test_rows.py tests/adapters/test_adapters.py \
	tests/adapters/test_merging.py tests/selection/test_measuring.py tests/test_tap.py \
	tests/training/test_preparation.py tests/commands/test_words.py tests/commands/test_predict.py
$(LOWEST)/.installed: $(VENV)/.installed
	$(BIN)/python tests/lowest.py | xargs $(BIN)/pip install -q --upgrade --target $(LOWEST)
	touch $@

test-lowest: $(LOWEST)/.installed
	PYTHONPATH=$(abspath $(LOWEST)) $(BIN)/python -m pytest $(BROAD) -k "not datasets_itself"

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h csrc/*/* benchmarks/guard/*.h benchmarks/guard/*.cpp benchmarks/rungs/*.cpp tests/sanitize/*.cpp

# Instruction, register and spill counts against the record.
guard: $(VENV)/.installed
	$(BIN)/python benchmarks/guard/guard.py

# Random calls in a child process. One round again: make fuzz ROUNDS=1 SEED=<its seed>.
ROUNDS ?= 10000
SEED ?= 0
fuzz: $(VENV)/.installed
	$(BIN)/python tests/fuzz --rounds $(ROUNDS) --seed $(SEED)

# The CPU kernels under AddressSanitizer, UBSan and ThreadSanitizer.
sanitize:
	$(PYTHON) tests/sanitize

# Missing barriers and fences of the CUDA kernels, without a GPU: SEEDS orders of their threads.
SEEDS ?= 100
races:
	$(PYTHON) tests/races --seeds $(SEEDS)

# kill -9, a full disk, flipped bits, two writers: what is read afterwards.
CRASH_ROUNDS ?= 200
crash: $(VENV)/.installed
	$(BIN)/python tests/crash.py --rounds $(CRASH_ROUNDS)

# Do the tests notice faults? MODULE=planted: those of tests/mutation/faults.py; MODULE=tap: COUNT
# of cosmic-ray's in that module, drawn by chance; without MODULE all of both, which takes an hour.
MODULE ?=
COUNT ?= 40
mutants: $(VENV)/.installed
	$(BIN)/pip install -q -e ".[mutation]" "$(TORCH)"
	$(BIN)/python tests/mutation/mutants.py $(MODULE) --count $(COUNT) $(ARGS)

# Each part alone: make bench PARTS=fisher. ARGS=--quick tries them without writing results;
# PARTS=selection ARGS="--data DIR" takes real SST-2.
PARTS ?= operators optimizer training selection fisher choices host growth rows rungs
ARGS ?=
RUN_PARTS = set -e; for part in $(PARTS); do $(1) benchmarks/bench_$$part.py $(ARGS) $(2); done; \
	$(1) benchmarks/render.py

bench: $(VENV)/.installed
	$(BIN)/pip install -q -e ".[bench]" "$(TORCH)" && \
	$(BIN)/pip install -q --no-deps backpack-for-pytorch==1.7.1 unfoldNd==0.2.3 || \
	echo "some peers do not install: shown as missing"
	@$(call RUN_PARTS,$(BIN)/python)

# On a machine with a GPU, with the torch that is there: builds, looks at the kernels' memory, tests,
# writes the receipt. Each part is a verb of its own that takes minutes: make gpu-check, make
# gpu-test, make gpu-bench PARTS=optimizer.
gpu: gpu-check gpu-test gpu-bench

gpu-build:
	$(PYTHON) setup.py -q build_ext --inplace

# Without torch's pool of memory, within which nothing would be out of bounds.
CHECKED = tests/ops/test_bias_grad_stats.py tests/ops/test_bias_example_grads.py \
	tests/training/test_optim.py
gpu-check: gpu-build
	@if command -v compute-sanitizer > /dev/null; then set -e; \
	for tool in memcheck racecheck initcheck; do \
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	$(PYTHON) -m pytest $(CHECKED) -k "cuda and not triton"; done; \
	else echo "gpu: compute-sanitizer is not on PATH: the kernels' memory is not checked"; fi

gpu-test: gpu-build
	$(PYTHON) -m pytest tests

gpu-bench: gpu-build
	@$(call RUN_PARTS,$(PYTHON),--device cuda)

docs: $(VENV)/.installed
	$(BIN)/python docs/model_table.py

clean:
	rm -rf $(VENV) build *.egg-info beft_ext/*.so out
