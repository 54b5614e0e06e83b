# make demo   prune, export, measure and report a real detector on this machine
# make test   lint, types and tests
# Each target makes what it needs on a fresh machine; a second call is quick.
#
# Variables: PYTHON=python3.12 (default: the newest python3 >= 3.10 found)
#            TORCH='torch==2.13.0 --index-url ...' (what pip is asked for; a CPU build is enough)
#            APT_PACKAGES='' (system packages that tests use; empty: install none)
TORCH ?= torch==2.13.0
APT_PACKAGES ?= chromium git gstreamer1.0-plugins-base gstreamer1.0-tools openssh-server python3-opencv python3-venv
JOBS ?= 2
PYTHON ?= $(firstword $(foreach python,python3.14 python3.13 python3.12 python3.11 python3.10 python3,$(if \
  $(shell $(python) -c 'import ensurepip, sys; assert sys.version_info >= (3, 10); print(1)' </dev/null 2>/dev/null),$(python))))

FOLDERS := cli data detectors pruning export deploy benchmarks
BIN := .venv/bin
SHELL := /bin/bash

.PHONY: demo test lint install system clean
.DELETE_ON_ERROR:

demo: install
	$(BIN)/edgeprune build --target host --input-size 320 --iterations 4 --finetune-epochs 4 \
	  --run-dir runs/demo --resume

# One thread a worker: two processes that each start a thread per core slow each other down.
test: lint system
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) -m 'not slow' </dev/null

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p edgeprune

install: .venv/.installed

.venv/.installed: pyproject.toml Makefile
	@test -n '$(PYTHON)' || { echo 'edgeprune needs Python >= 3.10 with venv (Debian: apt-get install python3-venv);' \
	  'or name one: make PYTHON=/path/to/python3' >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable .
	@# mypy cannot follow the package mapping of pyproject.toml: these links show it edgeprune/<folder>.
	mkdir -p build/types/edgeprune
	$(foreach folder,$(FOLDERS),ln -sfn ../../../$(folder) build/types/edgeprune/$(folder);)
	touch $@

# What only developers need; among it TensorRT for RTX, proprietary, whose builder the tests run.
.venv/.dev: .venv/.installed
	$(BIN)/python -m pip install --quiet --editable '.[dev,rtx]'
	touch $@

# Tests that need one of these are skipped, with the reason, where it cannot be installed.
system:
	@missing=''; \
	if command -v dpkg-query >/dev/null; then \
	  for package in $(APT_PACKAGES); do \
	    dpkg-query -W -f '$${Status}\n' "$$package" 2>/dev/null | grep -q ' installed$$' || missing+=" $$package"; \
	  done; \
	else echo 'No Debian packages here: tests that need one of [$(APT_PACKAGES)] look for it on the PATH.'; fi; \
	if [ -n "$$missing" ] && [ "$$(id -u)" = 0 ]; then \
	  apt-get update --quiet=2 && \
	  DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes --no-install-recommends $$missing </dev/null; \
	elif [ -n "$$missing" ]; then \
	  echo "Not root: tests that need$$missing are skipped. To run them: sudo apt-get install$$missing"; \
	fi

clean:
	rm -rf .venv build dist runs
