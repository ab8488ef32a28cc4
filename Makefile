# The daily commands. Each sets up what it needs; `make help` lists them.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Tests that start no cluster run in parallel; those that start one run alone.
PARALLEL := -n logical --maxprocesses 8 --dist worksteal
# The oldest supported protobuf generates the stubs, so that every newer runtime can load them.
PROTO_VENV := .venv-proto
PROTO_TOOLS := grpcio-tools==1.73.1 protobuf==6.30.2 setuptools==80.9.0

.DEFAULT_GOAL := help
.PHONY: help setup fix verify test test-slow test-full test-hosts faults soak simulate bench proto proto-check demo clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready ## create .venv with everything, torch pinned by constraints.txt

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "pscluster needs Python 3.11, 3.12 or 3.13: make setup PYTHON=python3.12"; exit 1; }
	@echo "setting up $(VENV) (once; torch is large, so this takes a minute or more)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

fix: setup ## format, and fix what the linter can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

verify: setup proto-check ## format, lint, strict types, proto drift, policy and unit tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy pscluster master/psmaster worker/psworker paramserver/psserver
	$(BIN)/pytest -q $(PARALLEL) tests/policy tests/unit

QUICK := tests/policy tests/unit tests/contract tests/fault/simulation
test: setup ## all tests but the slow ones and those of `make faults` (under 10 minutes on two cores)
	$(BIN)/pytest -q $(PARALLEL) -m 'not slow' $(QUICK)
	$(BIN)/pytest -q -m 'not slow' tests/cluster tests/hosts

test-slow: setup ## the tests that `make test` leaves out because they take long and rarely break
	$(BIN)/pytest -q -m slow $(QUICK) tests/cluster

test-full: test test-slow ## `make test`, then the slow tests

test-hosts: setup ## a secured cluster over four hosts, disturbed: needs root, ip, tc, unshare, nsenter (about 10 minutes)
	$(BIN)/pytest -q tests/hosts

FAULTS ?= tests/fault
faults: setup ## faults of real processes, disks and networks, and a short soak (about 25 minutes)
	$(BIN)/pytest -q $(FAULTS) --ignore tests/fault/simulation

soak: setup ## a job under a storm of kills, compared with the undisturbed job (KILLS=200 SEED= TIER=snapshot HOSTS=1)
	$(BIN)/python tests/fault/soak.py --kills $(or $(KILLS),200) $(if $(SEED),--seed $(SEED)) $(if $(TIER),--tier $(TIER)) \
	  $(if $(HOSTS),--hosts)

SEEDS ?= 5000
simulate: setup ## SEEDS=5000 random histories of a simulated cluster with faults; SEED=7 prints one
	@$(BIN)/python -m tests.fault.simulation $(if $(SEED),$(SEED),--seeds $(SEEDS))

bench: setup ## the benchmarks, each against its baseline in one run
	@for script in $(wildcard benchmarks/[a-z]*.py); do $(BIN)/python $$script || exit 1; done

$(PROTO_VENV)/.ready: Makefile
	@$(PYTHON) -m venv $(PROTO_VENV)
	@$(PROTO_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PROTO_TOOLS)
	@touch $@

define generate_stubs
	$(PROTO_VENV)/bin/python -m grpc_tools.protoc -I proto --python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) proto/pscluster/v1/*.proto
endef

proto: $(PROTO_VENV)/.ready ## regenerate pscluster/v1 from proto/
	$(call generate_stubs,.)

proto-check: $(PROTO_VENV)/.ready ## fail if pscluster/v1 is not what proto/ generates
	@rm -rf $(PROTO_VENV)/drift && mkdir -p $(PROTO_VENV)/drift
	@$(call generate_stubs,$(PROTO_VENV)/drift)
	@diff -r -x __pycache__ -x __init__.py $(PROTO_VENV)/drift/pscluster/v1 pscluster/v1 \
	  || { echo "pscluster/v1 is out of date: run make proto"; exit 1; }

demo: setup ## start a cluster, train a language model on Python's own source, show results, stop
	@$(BIN)/python examples/demo.py

clean: ## remove everything that these targets created
	rm -rf $(VENV) $(PROTO_VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
