# make run      sets everything up and starts a server
# make test     installs what the tests need and runs them all
# make help     names the rest

PYTHON ?= python3
ARGS ?=

VENV := .venv
STAMPS := $(VENV)/stamps
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
FOLDERS := ipc kernel drivers services bench

# Whatever makes an extension stale; setup.py then decides which.
NATIVE := setup.py ipc/cbuild.py $(shell find $(FOLDERS) -name '*.[ch]' -o -name 'build_*.py')

# The Python side is installed without the extensions, which are then built in place, and again when C changes.
INSTALL := ATOLL_EXTENSIONS= $(PIP) install --no-build-isolation --editable

.PHONY: endurance paging setup native run test test-setup bench bench-setup realdata lint sanitize powerloss torture clean help
.DELETE_ON_ERROR:

setup: $(STAMPS)/native

native: $(STAMPS)/native

run: setup
	$(VENV)/bin/atoll serve $(ARGS)

test: test-setup
	$(VENV)/bin/pytest $(ARGS)

test-setup: setup $(STAMPS)/system-test $(STAMPS)/dev

bench: bench-setup
	$(VENV)/bin/python -m atoll.bench.compare --json build/bench/bench.json --plot build/bench $(ARGS)

bench-setup: setup $(STAMPS)/system-bench

realdata: setup
	$(VENV)/bin/python -m atoll.bench.realdata $(ARGS)

endurance: test-setup
	$(VENV)/bin/python tests/endurance.py $(ARGS)

lint: setup $(STAMPS)/dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

sanitize: setup
	.ci/c-tests

# Many devices that power loss could leave, of a load of its own each time; a share of it is in `make test`.
paging: test-setup
	ATOLL_PAGING_GIB=$${ATOLL_PAGING_GIB:-1024} $(VENV)/bin/pytest tests/test_paging.py -s --timeout 3600 -k budget $(ARGS)

powerloss: test-setup
	ATOLL_POWERLOSS_STATES=$${ATOLL_POWERLOSS_STATES:-40000} ATOLL_POWERLOSS_SERVERS=$${ATOLL_POWERLOSS_SERVERS:-48} \
	ATOLL_POWERLOSS_OPERATIONS=$${ATOLL_POWERLOSS_OPERATIONS:-5000} \
	$(VENV)/bin/pytest tests/test_power_loss.py -s --timeout 3600 $(ARGS)

torture: test-setup
	ATOLL_TORTURE_SEED=$${ATOLL_TORTURE_SEED:-$$(date +%s)} ATOLL_TORTURE_SEEDS=$${ATOLL_TORTURE_SEEDS:-1000} \
	ATOLL_TORTURE_OPERATIONS=$${ATOLL_TORTURE_OPERATIONS:-1500} \
	$(VENV)/bin/pytest tests/test_dedup_torture.py -s --timeout 7200 $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.*
	find $(FOLDERS) tests -name __pycache__ -prune -exec rm -rf {} +
	find $(FOLDERS) \( -name '*.so' -o -name '*.o' \) -delete

help:
	@echo 'make setup     prepares .venv; the command is then .venv/bin/atoll'
	@echo 'make run       setup, then starts a server           ARGS="--sparse ..."'
	@echo 'make test      setup, what the tests need, all tests  ARGS="-k ring -x"'
	@echo 'make bench     beside nbdkit, qemu-nbd and the bare device  ARGS="--quick --rows read-1,read-32"'
	@echo 'make paging     memory with a volume of 1 TiB, wholly mapped (4.5 GB of disk)'
	@echo 'make powerloss  tens of thousands of devices that power loss could leave'
	@echo 'make torture   a thousand seeds of dedup against an oracle, with all that a disk and deaths may do'
	@echo 'make lint      ruff and mypy'
	@echo 'make endurance  an hour at nine tenths of a device      ARGS="--seconds 600 --seed 7"'
	@echo 'make realdata  savings with several versions of a package   ARGS="--package Django --version 4.2 --version 5.0"'
	@echo 'make sanitize  C tests under the sanitizers (address, undefined; thread where there are threads)'
	@echo 'make native    builds the C extensions that are stale'
	@echo 'make clean     removes all that was built, .venv too'
	@echo 'PYTHON=...     which Python (3.11 or newer) to build .venv with'

$(STAMPS)/system-build: .ci/system-packages
	PYTHON=$(PYTHON) .ci/system-packages build
	@mkdir -p $(@D) && touch $@

$(STAMPS)/system-test: .ci/system-packages
	.ci/system-packages test
	@mkdir -p $(@D) && touch $@

$(STAMPS)/system-bench: .ci/system-packages
	.ci/system-packages bench
	@mkdir -p $(@D) && touch $@

$(STAMPS)/venv: $(STAMPS)/system-build
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Atoll needs Python 3.11 or newer, %s is %s: say make PYTHON=..." % (sys.executable, sys.version.split()[0]))'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install 'setuptools>=77' 'cffi>=1.16'
	@touch $@

$(STAMPS)/installed: $(STAMPS)/venv setup.py pyproject.toml
	$(INSTALL) .
	@touch $@

$(STAMPS)/dev: $(STAMPS)/installed
	$(INSTALL) '.[dev]'
	@touch $@

# Locked, since several people may work in one checkout. The stamp's time is that of the start: what is edited
# meanwhile is newer.
$(STAMPS)/native: $(STAMPS)/installed $(NATIVE)
	@mkdir -p build && touch $@.started
	flock build/lock $(VENV)/bin/python setup.py --quiet build_ext --inplace
	@mv $@.started $@
