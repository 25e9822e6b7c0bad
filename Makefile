# Two commands do all set-up: `make demo` and `make test`. Each first brings .venv up to date.
# For daily work there is `make test-fast`.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
# What nodes and images install, and what the work on the package needs besides.
LOCKS := cluster/requirements.lock requirements-dev.lock
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: install lock demo test test-fast test-controls test-night test-cluster test-gpu lint clean

install: $(STAMP)

$(STAMP): pyproject.toml $(LOCKS)
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --require-hashes $(LOCKS:%=--requirement %)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(STAMP)

# Makes the locks anew from pyproject.toml, for every Python that it allows. Versions that still fit stay as they are:
# `make lock UPGRADE=--upgrade` takes the newest of all, UPGRADE='--upgrade-package torch' of one.
COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.10 --generate-hashes \
	--custom-compile-command 'make lock' $(UPGRADE) pyproject.toml

lock: install
	$(COMPILE) --extra aws --extra gcp --output-file $(word 1,$(LOCKS))
	$(COMPILE) --all-extras --constraint $(word 1,$(LOCKS)) --output-file $(word 2,$(LOCKS)) \
		$$(sed -n 's/^\([a-z0-9.-]*\)==.*/--no-emit-package \1/p' $(word 1,$(LOCKS)))

# Generates the shapes, trains SupOnly and then U2PL with two CPU workers, and compares them on a page.
# DEMO_FLAGS are added to both, such as --optim.steps 20 for a look at the output only.
TRAIN_DEMO = $(BIN)/python jobs/train.py --preset demo --data demo/shapes --split 1_16 --scaling.workers 2 $(DEMO_FLAGS)

demo: install
	test -f demo/shapes/dataset.json || $(BIN)/python jobs/prepare.py --source shapes --out demo/shapes
	$(TRAIN_DEMO) --method suponly --out demo/suponly
	$(TRAIN_DEMO) --method u2pl --out demo/u2pl
	$(BIN)/python jobs/report.py demo/suponly demo/u2pl --out demo/report.html

# Two files at a time, in the order in which the folders are named: the tests of real clusters wait the longest, the
# small files of the unit tests fill the end. What the tests of a file share is made once.
PYTEST = $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: install
	$(PYTEST) --durations 20 tests/integration tests/parity tests/unit

# Without what takes long: real clusters (tests/integration), and runs and compiled functions that are compared with
# others (tests/parity).
test-fast: lint
	$(PYTEST) tests/unit

# Whole runs, three seeds each: a method without its unlabeled side must score as SupOnly. About an hour on two cores.
test-controls: install
	$(BIN)/python -m pytest --numprocesses 2 --dist load -m controls tests/parity/test_controls.py

# Long tests of whole runs (they shrink, lose their storage, are killed at every point of a checkpoint, or once a minute),
# and what is compiled of methods that the daily tests only trace.
test-night: install
	$(BIN)/python -m pytest -s -m night tests/integration tests/parity

# What only a GPU can show, on a machine with one; elsewhere each test is skipped.
test-gpu: install
	$(BIN)/python -m pytest tests/gpu

# Hosts with networks of their own on this one machine: training loses them, the launcher reaches them by ssh.
# As root, with iproute2, openssh-server and rsync; the first command says what is missing.
test-cluster: install
	$(BIN)/python -m tests.hosts
	$(BIN)/python -m pytest tests/cluster

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf .venv demo
