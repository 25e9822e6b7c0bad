# Two commands do all set-up: `make demo` and `make test`. Each first brings .venv up to date.
# For daily work there is `make test-fast`.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: install demo test test-fast test-controls test-cluster lint clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,view]'
	touch $(STAMP)

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
