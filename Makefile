# make demo     the main job on a real model, start to end (makes .venv on the first run)
# make test     the fast tests (20 to 25 minutes on two cores)
# make check    format, lint, types, fast tests: what a change has to pass
#
# ARGS goes through: make demo ARGS="--quick --out runs/first", make test ARGS="-k topk".
# PYTHON chooses the interpreter for a new environment: make demo PYTHON=python3.12.

VENV ?= .venv
ARGS ?=
export VENV
ifdef PYTHON
export PYTHON
endif

ROOMS := sae steering mechanisms kernels checkpoints cli
CODE := $(ROOMS) tests benchmarks examples
BIN := $(VENV)/bin
# -P keeps the top-level folders off sys.path: the code is imported as saesteer, as installed.
RUN := $(BIN)/python -P -m
RESULTS := --csv benchmarks/results --page docs/performance.md
ARCHS := --arch topk,batchtopk,matryoshka,jumprelu

# The targets share one environment; making it twice at once would break it.
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-durable test-browser test-scale check lint types format \
	bench gpu peers docs readme-demo dist \
	typecheck-links \
	env-run env-dev \
	clean distclean

help:
	@echo 'make demo             the main job on a real model, start to end (ARGS=--quick: shorter)'
	@echo 'make test             the fast tests'
	@echo 'make check            format, lint, types and the fast tests'
	@echo 'make format           rewrite the code in our format'
	@echo 'make test-slow        the slow tests: the real model, both make commands (minutes)'
	@echo 'make test-durable     kill, break and fuzz: 20 kills a source, disk faults, malformed files'
	@echo 'make test-browser     the server: its playground in a real browser, 64 clients at once'
	@echo 'make test-scale       training by two and four processes: steps, states, kills, restarts'
	@echo 'make bench            the benchmarks on the CPU (10 minutes at most); rewrites docs/performance.md'
	@echo 'make gpu              the benchmarks on a GPU in 8 minutes, with its page (ARGS="--minutes 4")'
	@echo 'make peers            the other projects that the benchmarks compare with'
	@echo 'make docs             the documentation site, with every link checked: build/docs/site/index.html'
	@echo 'make readme-demo      the demo again, and its printout into README.md'
	@echo 'make dist             the wheel and the source archive, and whether PyPI would take them'
	@echo 'make typecheck-links  the git-ignored tree of links that type checkers need'
	@echo 'make clean            remove caches and build products (distclean: .venv too)'

demo: env-run
	@$(BIN)/saesteer demo $(ARGS)

# One worker process a core; a failure is repeated in one process, under a debugger if need be, with
# make test ARGS="-n0 --pdb tests/...".
test: env-dev
	@echo 'saesteer: the fast tests: all of them take 20 to 25 minutes on two cores' >&2
	@echo '  left out: make test-slow (real model, network), make test-durable (kills, faults, fuzzing), make test-scale' >&2
	@$(RUN) pytest -n auto --dist worksteal $(ARGS)

test-slow: env-dev
	@$(RUN) pytest --run-slow --timeout 3600 -m slow $(ARGS)

# What a kill, a failing disk, a power cut or a stranger's file may do; prints its counts.
test-durable: env-dev
	@FUZZ_EXAMPLES=1000 $(RUN) pytest --run-slow --timeout 3600 -rP tests/checkpoints/test_run_state.py \
		tests/checkpoints/test_malformed.py tests/checkpoints/test_safe_reading.py \
		tests/checkpoints/test_fuzzed_reading.py \
		tests/steering/plans/test_plan_malformed.py tests/steering/exchange tests/sae/training/test_kills.py \
		tests/sae/training/test_run_folder.py tests/sae/verbs/test_reproduce.py \
		tests/sae/verbs/test_reproduce_harvest.py $(ARGS)

# The playground in Debian's Chromium (the newest pictures: SCREENSHOTS=DIR), and 64 clients at once.
test-browser: env-dev
	@command -v chromium >/dev/null || { \
		[ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq chromium; } || \
		echo 'saesteer: no chromium (Debian: apt-get install chromium): the browser tests are skipped' >&2
	@$(BIN)/python -m pip --disable-pip-version-check -q install --no-build-isolation -e '.[browser]'
	@$(RUN) pytest --run-slow --timeout 1800 -m slow -rs tests/steering/serving $(ARGS)

# Two and four processes on this machine, over gloo: the same steps and files as one, kills, restarts.
test-scale: env-dev
	@$(RUN) pytest --run-slow --timeout 3600 tests/sae/training/test_several_processes.py \
		tests/sae/runs/test_mesh_cost.py $(ARGS)
	@$(RUN) pytest --run-slow --timeout 3600 -rP tests/sae/training/test_kills.py -k "of-two or gloo" $(ARGS)

check: lint types test

lint: env-dev
	@$(RUN) ruff format --check .
	@$(RUN) ruff check .

types: env-dev typecheck-links
	@$(RUN) mypy

format: env-dev
	@$(RUN) ruff check --fix .
	@$(RUN) ruff format .

bench: env-dev
	@$(BIN)/python benchmarks/train_step.py --device cpu $(RESULTS) $(ARGS)
	@$(BIN)/python benchmarks/train_step.py --device cpu --auxk $(RESULTS) $(ARGS)
	@$(BIN)/python benchmarks/train_step.py --device cpu $(ARCHS) $(RESULTS) $(ARGS)
	@$(BIN)/python benchmarks/kernels.py --device cpu $(RESULTS) $(ARGS)

# Proved on a CPU by: make gpu ARGS="--device cpu --smoke".
gpu: env-dev
	@$(BIN)/python benchmarks/gpu.py $(ARGS)

# dictionary_learning asks for an old nnsight, torchvision, diffusers and more, which its trainers do
# not use and which can break the transformers that is here: it comes without them.
peers: env-dev
	@$(BIN)/python -m pip --disable-pip-version-check -q install --no-build-isolation -e '.[peers]'
	@$(BIN)/python -m pip --disable-pip-version-check -q install --no-deps 'dictionary-learning>=0.1,<0.2'

# ARGS="--out FOLDER" builds elsewhere.
docs: env-run
	@$(BIN)/python -m pip --disable-pip-version-check -q install -e '.[docs]'
	@$(BIN)/python -P docs/build_site.py $(ARGS)

# Nobody types what the README says that the demo printed.
readme-demo: env-run
	@mkdir -p runs
	$(BIN)/saesteer demo --force -o runs/readme-demo $(ARGS) > runs/readme-demo.txt
	$(BIN)/python docs/put_demo.py runs/readme-demo.txt --demo runs/readme-demo/demo.json

dist: env-dev
	@$(BIN)/python -m pip --disable-pip-version-check -q install build twine
	@rm -rf dist build/lib
	@$(BIN)/python -P -m build
	@$(BIN)/python -P -m twine check --strict dist/*

typecheck-links:
	@mkdir -p .typecheck/saesteer
	@for room in $(ROOMS); do ln -sfn ../../$$room .typecheck/saesteer/$$room; done
	@ln -sfn ../../cli/toplevel/__init__.py ../../cli/toplevel/__main__.py .typecheck/saesteer/

env-run:
	@.ci/env run

env-dev:
	@.ci/env dev

clean:
	rm -rf build dist *.egg-info .typecheck .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find $(wildcard $(CODE)) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	@if [ -f $(VENV)/pyvenv.cfg ]; then echo rm -rf $(VENV); rm -rf $(VENV); fi
