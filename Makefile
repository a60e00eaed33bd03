# make demo    installs what is missing, runs NFT end to end on this machine, prints the result
# make test    installs what is missing, runs the tests
# make test-launch    installs Slurm where it may (Debian, as root), runs the tests that submit jobs to it
# make test-gpu PYTHON=python3    the tests that need a GPU, with the packages that are there
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin/python
DEMO_RUN ?= runs/demo
DEMO_ARGS ?=
export HF_HUB_OFFLINE ?= 1
export OMP_NUM_THREADS ?= $(shell nproc)
# two files of tests at a time, each process with one thread: most of their time goes by in one; in this order, so that a short file is last
TESTS := OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
ALL := tests/end_to_end tests/distributed tests/unit tests/gpu

.PHONY: setup demo test test-fast test-long test-launch test-gpu reproduce reproduce-quick lint clean

setup: $(VENV)/installed

$(VENV)/installed: requirements/cpu.txt requirements/install.sh setup.py
	PYTHON=$(PYTHON) bash requirements/install.sh $(VENV)
	@touch $@

# for benchmarks/against_trl.py
.venv-benchmarks/installed: requirements/benchmarks.txt requirements/install.sh setup.py
	PYTHON=$(PYTHON) bash requirements/install.sh .venv-benchmarks requirements/benchmarks.txt
	@touch $@

# NeMo-Run, for megatron_nft/recipes
.venv-launch/installed: requirements/launch.txt requirements/install.sh setup.py
	PYTHON=$(PYTHON) bash requirements/install.sh .venv-launch requirements/launch.txt
	@touch $@

demo: setup
	@if [ -f $(DEMO_RUN)/config.yaml ]; then rm -rf $(DEMO_RUN); fi  # an earlier demo's; nothing else is removed
	$(RUN) -m megatron_nft train examples/arithmetic/nft.yaml run_dir=$(DEMO_RUN) $(DEMO_ARGS)

# the paper's comparison: 51 runs, resumable; table and curves go to docs/ (the quick one: two runs, to runs/reproduction/)
reproduce: setup
	$(RUN) examples/reproduction/reproduce.py $(REPRODUCE_ARGS)

reproduce-quick: setup
	$(RUN) examples/reproduction/reproduce.py --quick $(REPRODUCE_ARGS)

test: setup
	$(TESTS) $(ALL)

test-fast: setup
	$(TESTS) tests/unit -m "not slow"

test-long: setup
	MEGATRON_NFT_LONG=1 $(TESTS) $(ALL)

# where Slurm is missing and can be installed (Debian, root, a network) it is, and so is NeMo-Run; elsewhere the tests skip, and say why
test-launch: setup
	@$(MAKE) .venv-launch/installed || echo "NeMo-Run could not be installed (see above): the recipes' tests skip"
	@# RUNLEVEL=1: the packages' services are not started, the tests start their own
	@if ! { command -v slurmctld && command -v munged; } >/dev/null && [ $$(id -u) = 0 ] && command -v apt-get >/dev/null; then \
	  { apt-get update -q && DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -qy --no-install-recommends slurm-wlm munge; } || echo "Slurm could not be installed"; fi
	$(RUN) -m pytest tests/launch -rs

# on a machine with a GPU: installs nothing; PYTHON and PYTHONPATH say where the packages are. What was measured is printed at the end, and
# goes to $MEGATRON_NFT_RESULTS/test_gpu.json where that is set
test-gpu:
	@$(PYTHON) tests/gpu/needed.py
	$(PYTHON) -m pytest tests/gpu

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean:
	rm -rf $(VENV) .venv-benchmarks .venv-launch runs build *.egg-info
