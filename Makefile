# Two entry points: `make demo` and `make test`; each sets up everything it needs.
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.ready
DEBIAN := libegl1 libgl1 libosmesa6 libgl1-mesa-dri
export MUJOCO_GL ?= egl
export PYOPENGL_PLATFORM ?= $(MUJOCO_GL)
# Worker processes use the cores; threads inside each would fight over them.
export OMP_NUM_THREADS ?= 1
export LP_NUM_THREADS ?= 1

.PHONY: help setup demo test lint clean system

help:
	@echo "make demo   set up, adapt the built-in VLA on two tasks, write runs/demo/report.html"
	@echo "make test   set up, lint, type check, run all tests"
	@echo "make lint   ruff and mypy"
	@echo "make clean  remove the environment"

setup: $(STAMP)

system:
	@missing=""; for p in $(DEBIAN); do dpkg -s $$p >/dev/null 2>&1 || missing="$$missing $$p"; done; \
	if [ -n "$$missing" ]; then \
	  if [ "$$(id -u)" = 0 ]; then apt-get update -qq && apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	  else echo "missing Debian libraries: run  sudo apt-get install$$missing" >&2; exit 1; fi; fi

$(STAMP): requirements.lock pyproject.toml | system
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "python3 is older than 3.11: install Python 3.11 and put it first in PATH" >&2; exit 1; }
	@test -x $(PY) || python3 -m venv $(VENV)
	@echo "installing the locked packages into $(VENV) (about two minutes the first time)"
	@$(PY) -m pip install -q --disable-pip-version-check -c requirements.lock "$$(grep '^torch==' requirements.lock)"
	@$(PY) -m pip install -q --disable-pip-version-check --no-deps -r requirements.lock
	@$(PY) -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(STAMP)

demo: setup
	@$(VENV)/bin/ratchet demo

lint: setup
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check -q .
	@$(VENV)/bin/mypy agent

test: lint
	@$(PY) -m pytest

clean:
	rm -rf $(VENV) build *.egg-info
