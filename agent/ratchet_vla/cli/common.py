"""What several verbs share: opening policies with adapters, environments, tables and run folders.

Knows how the parts are put together for one process. Holds no logic of its own.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ratchet_sim import registry
from ratchet_sim.base import TaskInfo
from ratchet_sim.workers.vector import ChunkVectorEnv, Launcher, local_process
from ratchet_vla.adapters.identity import Binding, binding_of
from ratchet_vla.adapters.lora.layers import Lora, attach, lora_config, room_for
from ratchet_vla.adapters.protocol import BASE
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.adapters.swap.hotswap import HotSwapper, SwapReport
from ratchet_vla.contract import RobotContract, require_compatible
from ratchet_vla.errors import RatchetError
from ratchet_vla.paths import MODELS
from ratchet_vla.policy import computing, device
from ratchet_vla.policy import threads as policy_threads
from ratchet_vla.policy.checkpoints import adopted
from ratchet_vla.policy.checkpoints.own import AnyPolicy
from ratchet_vla.policy.protocol import Policy
from ratchet_vla.storage import documents

# By the start of the suite's name: LIBERO-PRO's perturbed suites share their original's policy.
SMALL = {
    "metaworld": MODELS / "small-metaworld",
    "libero_object": MODELS / "small-libero-object",
}
EVERYTHING_LINEAR = r"(projector|language_model\.model|state_projector|language_model\.lm_head).*"


@dataclass(frozen=True)
class LoraOptions:
    """The adapter's shape."""

    rank: int = 32
    """Rank of the low-rank update."""
    alpha: float = 32.0
    """Scale: the update is multiplied by alpha / rank."""
    targets: str = "all-linear"
    """Layers that carry it: "all-linear" or a regular expression over module names."""
    seed: int = 0
    """Seed of the initial values."""


@dataclass
class Running:
    """A policy that is in use and whose adapter is changed by hot swap only."""

    policy: AnyPolicy
    swapper: HotSwapper
    swaps: list[SwapReport]

    def serve(self, adapter_id: str) -> AnyPolicy:
        """The policy with this adapter ("" for the base) in force."""
        wanted = adapter_id or self.swapper.base_id
        if self.swapper.current_id != wanted:
            self.swaps.append(self.swapper.swap(wanted))
        return self.policy


def threads(count: int) -> None:
    """Inference and training threads of this process; workers take the other cores."""
    if warning := policy_threads.use(count):
        Console(stderr=True).print(f"[yellow]{warning}[/]", highlight=False)


def policy_folder(suite: str, given: Path | None) -> Path:
    """The policy that the user named, or the built-in one of the suite.

    Raises:
        RatchetError: cli.no_policy.
    """
    if given is not None:
        return given
    for start, folder in SMALL.items():
        if suite.startswith(start):
            return folder
    raise RatchetError("cli.no_policy", f"no built-in policy for suite '{suite}'", fix="name one with --policy FOLDER")


def open_policy(
    folder: Path,
    contract: RobotContract,
    options: LoraOptions,
    where: torch.device | str = "",
    made_for: Binding | None = None,
) -> tuple[AnyPolicy, Lora]:
    """Load a base, check it against the robot, attach an empty adapter.

    where: a device, or its name; "" for the one that RATCHET_DEVICE names, see `ratchet_vla.policy.device.choose`.
    made_for: of the adapter that `options` are the shape of: another base may not even have its layers.

    Raises:
        RatchetError: adapter.wrong_base, adapter.wrong_statistics, adapter.wrong_action_space, and what loading, the
            compatibility check and `attach` raise.
    """
    policy = adopted.load(folder, where if isinstance(where, torch.device) else device.choose(where))
    require_compatible(policy.spec, contract)
    if made_for is not None:
        binding_of(policy).require(made_for, where=str(folder))
    return policy, attach(policy.module, lora_config(options.rank, options.alpha, options.targets), seed=options.seed)


def lora_of(store: FolderStore, reference: str) -> LoraOptions:
    """The shape of the adapter's layers, as its configuration says; any, for the base."""
    if store.resolve(reference) == BASE:
        return LoraOptions()
    config = room_for(store.get(reference).config)
    return LoraOptions(rank=config.r, alpha=float(config.lora_alpha), targets=str(config.target_modules))


def made_for(store: FolderStore, reference: str) -> Binding | None:
    """What a stored adapter is bound to; None for the base."""
    return None if store.resolve(reference) == BASE else store.card(reference).binding


def open_running(
    folder: Path,
    contract: RobotContract,
    options: LoraOptions,
    store: FolderStore | None,
    where: torch.device | str = "",
    made_for: Binding | None = None,
) -> Running:
    policy, lora = open_policy(folder, contract, options, where, made_for)
    return Running(policy, HotSwapper(policy, lora, store=store), [])


def copy_adapter(store: FolderStore, source: FolderStore, reference: str) -> str:
    """Copy an adapter and those it descends from into another store, with what their cards tell; returns its id."""
    for identity in reversed(source.lineage(reference)):
        store.put(source.get(identity), source.card(identity).provenance)
    return source.resolve(reference)


def share_base(policy: AnyPolicy, other: AnyPolicy) -> int:
    """Let a policy read another's frozen weights instead of keeping its own; returns the bytes that this frees.

    Both must be the same base with LoRA layers, on one device, and nobody may change the base's weights afterwards.
    """
    theirs = {n: p for n, p in other.module.named_parameters() if not p.requires_grad}
    freed = 0
    for name, parameter in policy.module.named_parameters():
        if not parameter.requires_grad and name in theirs:
            parameter.data = theirs[name].data
            freed += parameter.nbytes
    return freed


def make_vector(
    policy: Policy, suite: str, contract: RobotContract, workers: int, slots: int, rollouts: str = "local"
) -> ChunkVectorEnv:
    """rollouts: where the simulators run, "local" processes, or Ray: "local-ray" or the address of a cluster."""
    launch: Launcher = local_process
    if rollouts != "local":
        from ratchet_sim.workers.ray_actors import RayLauncher

        launch = RayLauncher(rollouts)
    return ChunkVectorEnv(
        suite,
        cameras=policy.spec.cameras,
        state_fields=policy.spec.state,
        chunk=policy.spec.chunk,
        workers=workers,
        slots_per_worker=slots,
        contract=contract,
        launch=launch,
    )


def find_tasks(suite: str, names: Sequence[str]) -> dict[str, TaskInfo]:
    """Raises RatchetError sim.unknown_suite, sim.unknown_task."""
    registry.tasks(suite)
    return {name: registry.task(suite, name) for name in names}


def print_contract(console: Console, contract: RobotContract) -> None:
    """What the policy is allowed to do, before it does anything."""
    table = Table(title=f"contract {contract.name}  {contract.control_hz:g} Hz  id {contract.id[:12]}", box=None)
    for column in ("dimension", "unit", "range per step", "velocity limit", "acceleration limit"):
        table.add_column(column, justify="left" if column in ("dimension", "unit") else "right")
    for dim, velocity, acceleration in zip(
        contract.action.dims, contract.limits.velocity, contract.limits.acceleration, strict=True
    ):
        table.add_row(dim.name, dim.unit, f"{dim.low:g} … {dim.high:g}", f"{velocity:g}/s", f"{acceleration:g}/s²")
    console.print(table)
    cameras = ", ".join(f"{c.name} {c.width}x{c.height} turned {c.rotate}°" for c in contract.cameras)
    console.print(
        f"cameras: {cameras}; workspace {contract.limits.workspace_low} to {contract.limits.workspace_high} m\n"
    )


def describe_run(title: str, command: str, **facts: Any) -> dict[str, Any]:
    """The contents of run.json: enough to know later what was run, where and with what."""
    packages = ("torch", "transformers", "peft", "mujoco", "metaworld", "numpy", "gymnasium", "ratchet-vla")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "title": title,
        "command": command,
        "started": now(),
        "host": {
            "processor": computing.processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": str(device.choose()),
            "computing": _computing(),
            "python": platform.python_version(),
        },
        "versions": versions,
        **facts,
    }


def write_json(path: Path, data: Any) -> None:
    """A run folder's file: replaced at once, what JSON does not know in words."""
    documents.write_json(path, data, indent=1, durable=False, default=str)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def command_line() -> str:
    """This process's command, to copy into a shell; a benchmark that calls a verb is named, not the verb."""
    if Path(sys.argv[0]).name == "ratchet":
        return shlex.join(["ratchet", *sys.argv[1:]])
    return shlex.join(["python", *sys.orig_argv[1:]])


def _computing() -> dict[str, str]:
    """What a policy whose checkpoint declares bfloat16 computes in here, and why."""
    choice = computing.choose(device.choose(), "bfloat16")
    return {"dtype": choice.name, "reason": choice.reason}


Emit = Callable[[str, dict[str, Any]], None]
