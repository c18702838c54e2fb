# Two commands for a new user: `make demo` and `make test`. Everything is installed into .venv; `make clean` removes it.
#
#   PYTHON=python3.12   the interpreter that .venv is made from
#   TORCH=torch==2.12.0 the torch to install; without it, a torch that PYTHON already has is used, else torch==2.13.0
#   ARGS='-k verify'    more arguments for what the target runs: pytest, `blockdraft demo`, `blockdraft bench`, ...

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON ?= python3
TORCH ?=
ARGS ?=
RESULT ?= bench/results/this_machine.json
NONE_IS_FINE := $(if $(ARGS),|| [ $$? = 5 ]) # pytest's status where ARGS select no test of a target's

# cmake and ninja come as wheels into .venv; the tests call them by name. .venv itself is made by what is outside it.
OUTER_PATH := $(PATH)
export PATH := $(CURDIR)/.venv/bin:$(PATH)
SOURCES := CMakeLists.txt pyproject.toml tools/build_backend.py $(shell find csrc cmake -type f -not -name '.*')

.PHONY: help demo test test-cpu gpu-emulator test-full gpu-gates lint bench nano wheel clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

demo: .venv/.built ## generate with the bundled model, plainly and by blocks, and compare
	@blockdraft demo $(ARGS)

test: test-cpu gpu-emulator ## the whole test suite, large counts as seeded subsets

test-cpu: .venv/.built .venv/.extras-test ## of the test suite, all but the emulated GPU kernels
	@python -m pytest -m 'not emulated' $(ARGS) $(NONE_IS_FINE)

# One thread for each of the processes, since the emulator has one.
gpu-emulator: .venv/.built .venv/.extras-test ## of it, the GPU kernels run on the CPU, under sanitizers and with barriers missing, too
	@OMP_NUM_THREADS=1 python -m pytest -m emulated -n auto --maxprocesses 8 --dist worksteal -p no:benchmark $(ARGS) \
	$(NONE_IS_FINE)

test-full: .venv/.built .venv/.extras-test ## the test suite with all counts; the result goes to tests/results/
	@mkdir -p build tests/results
	@status=0; BLOCKDRAFT_TEST_FULL=1 python -m pytest --junitxml=build/test-full.xml $(ARGS) || status=$$?; \
	python tools/test_summary.py build/test-full.xml tests/results/full.json; exit $$status

gpu-gates: .venv/.built .venv/.extras-test .venv/.extras-cuda ## GPU kernels compiled for all chips, what they use held to a table
	@python tools/gpu_gates.py $(ARGS)

lint: .venv/.built .venv/.extras-dev ## ruff, mypy, clang-format and the project's own rules
	ruff check .
	ruff format --check .
	mypy
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs clang-format --dry-run --Werror
	! grep -rnE '#include <(torch|ATen|c10)/' csrc/cpu csrc/gpu

bench: .venv/.built ## each operator against PyTorch at the 8B model's shapes; JSON to RESULT=bench/results/....json
	@mkdir -p '$(dir $(RESULT))'
	@blockdraft bench --json '$(RESULT)' $(ARGS)

# glibc gives freed memory back by default; a training step would fault it in again, a sixth of its time.
nano: .venv/.built .venv/.extras-test ## the recipe of the bundled model in small, text to checked weights, in build/nano-ci; 5 minutes
	@MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_TOP_PAD_=500000000 \
	python recipes/nano/ci.py build/nano-ci $(ARGS)

wheel: .venv/.built .venv/.extras-dev ## dist/: a wheel for this Python and the source distribution
	@python -m build --no-isolation --sdist --wheel

clean: ## remove .venv and everything built
	rm -rf .venv build dist

# Stamps: a second run does nothing. A changed TORCH or PYTHON takes effect after `make clean`.
.venv/.created: tools/environment.py
	@export PATH='$(OUTER_PATH)'; \
	command -v '$(PYTHON)' > /dev/null || { echo 'missing: $(PYTHON) -- apt-get install python3' >&2; exit 2; }; \
	'$(PYTHON)' tools/environment.py create $(TORCH)
	@touch $@

.venv/.built: .venv/.created $(SOURCES)
	@.venv/bin/python tools/environment.py build
	@touch $@

.venv/.extras-%: .venv/.created pyproject.toml
	@.venv/bin/python tools/environment.py extras $*
	@touch $@
