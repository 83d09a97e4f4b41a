"""Registry of simulated suites: which tasks exist and how to build one.

Knows names, contracts and constructors; imports a simulator only when a task of it is asked for.
"""

from __future__ import annotations

import dataclasses
import sys

from ratchet_sim.base import Expert, TaskEnv, TaskInfo, unknown_name
from ratchet_sim.perturbations import MARK, split
from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.paths import ROBOTS

__all__ = ["contract_for", "make_env", "make_expert", "suites", "task", "tasks"]


def suites() -> list[str]:
    """Names of all suites."""
    from ratchet_sim.libero.suites import libero_suites

    return ["metaworld", *libero_suites()]


def tasks(suite: str) -> list[TaskInfo]:
    """All tasks of a suite, in the benchmark's order; builds nothing.

    Raises:
        RatchetError: sim.unknown_suite.
    """
    if suite == "metaworld":
        from ratchet_sim.metaworld.env import task_infos

        return task_infos()
    if suite not in suites():
        raise unknown_name("suite", suite, suites(), "sim.unknown_suite")
    from ratchet_sim.libero.suites import libero_task_infos

    return libero_task_infos(suite)


def task(suite: str, name: str) -> TaskInfo:
    """One task by name.

    Beside the suite's own names there are `task@perturbation` (see `perturbations`) and `other_suite/task`, for suites
    of the same robot such as LIBERO-PRO's.

    Raises:
        RatchetError: sim.unknown_task, sim.unknown_suite, sim.unknown_perturbation, sim.other_robot.
    """
    if MARK in name or "/" in name:
        other_suite, plain_name, _ = parts(suite, name)
        if contract_for(other_suite).id != contract_for(suite).id:
            raise RatchetError("sim.other_robot", f"suite '{other_suite}' has another robot than '{suite}'", where=name)
        return dataclasses.replace(task(other_suite, plain_name), name=name)
    task_list = tasks(suite)
    for info in task_list:
        if info.name == name:
            return info
    raise unknown_name("task", name, [info.name for info in task_list], "sim.unknown_task")


def parts(suite: str, name: str) -> tuple[str, str, str]:
    """`[suite/]task[@perturbation]` -> (suite, task, perturbation or empty)."""
    plain_name, perturbation = split(name)
    other_suite, has_suite, task_name = plain_name.rpartition("/")
    if not has_suite:
        return suite, plain_name, perturbation
    return other_suite, task_name, perturbation


def contract_for(suite: str) -> RobotContract:
    """The contract that the suite's robot is described by."""
    return RobotContract.load(ROBOTS / ("metaworld.yaml" if suite == "metaworld" else "libero.yaml"))


def make_env(suite: str, name: str, contract: RobotContract | None = None) -> TaskEnv:
    """Build one task's environment in this process (compiles its model)."""
    task(suite, name)
    contract = contract or contract_for(suite)
    task_suite, plain_name, perturbation = parts(suite, name)
    if task_suite == "metaworld":
        from ratchet_sim.metaworld.env import MetaWorldTaskEnv

        return MetaWorldTaskEnv(plain_name, contract, perturbation=perturbation)
    from ratchet_sim.libero.env import LiberoTaskEnv

    return LiberoTaskEnv(task_suite, plain_name, contract, perturbation=perturbation)


def make_expert(suite: str, name: str) -> Expert:
    """The scripted expert of a task. Raises RatchetError sim.no_expert where none exists."""
    if suite == "metaworld":
        from ratchet_sim.metaworld.env import MetaWorldExpert

        return MetaWorldExpert(name)
    from ratchet_sim.libero.expert import make_libero_expert

    return make_libero_expert(suite, name)


def release() -> None:
    """Close the renderers that this process keeps for the next environment; the next one makes its own."""
    module = sys.modules.get("ratchet_sim.metaworld.env")  # not imported: nothing to close
    if module is not None:
        module.close_frames()
