"""What several verbs share: opening policies with adapters, simulators and run folders.

Knows how the parts are put together for one process. Holds no logic of its own.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ratchet_sim import registry
from ratchet_sim.base import TaskInfo
from ratchet_sim.workers.vector import ChunkVectorEnv, Launcher, local_process
from ratchet_vla.adapters.identity import Binding, binding_of
from ratchet_vla.adapters.lora.layers import Lora, attach, lora_config, room_for
from ratchet_vla.adapters.protocol import BASE
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.adapters.swap.hotswap import HotSwapper, SwapReport
from ratchet_vla.cli import display
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


@dataclass(frozen=True)
class LoraOptions:
    """The adapter's shape."""

    rank: int = 32
    """Rank of the low-rank update."""
    alpha: float = 32.0
    """Scale: the update is multiplied by alpha / rank."""
    targets: str = "all-linear"
    """Layers that get an update: "all-linear", or a regular expression over the names of modules."""
    seed: int = 0
    """Seed of the update's initial values."""


@dataclass
class Running:
    """A policy that is in use and whose adapter is changed by hot swap only.

    Attributes:
        policy: The policy, with LoRA layers attached.
        swapper: Exchanges its adapter.
        swaps: Reports of the swaps so far, oldest first.
    """

    policy: AnyPolicy
    swapper: HotSwapper
    swaps: list[SwapReport]

    def serve(self, adapter_id: str) -> AnyPolicy:
        """Swap to this adapter ("" for the base) unless it is active, and return the policy."""
        target_id = adapter_id or self.swapper.base_id
        if self.swapper.current_id != target_id:
            self.swaps.append(self.swapper.swap(target_id))
        return self.policy


def threads(count: int) -> None:
    """Set the inference and training threads of this process; simulator workers take the other cores."""
    if warning := policy_threads.use(count):
        Console(stderr=True).print(f"[yellow]{warning}[/]", highlight=False)


def policy_folder(suite: str, named: Path | None) -> Path:
    """Return the folder of the policy that the user named, or of the suite's built-in one.

    Raises:
        RatchetError: cli.no_policy.
    """
    if named is not None:
        return named
    for start, folder in SMALL.items():
        if suite.startswith(start):
            return folder
    raise RatchetError("cli.no_policy", f"no built-in policy for suite '{suite}'", fix="name one with --policy FOLDER")


def open_policy(
    folder: Path,
    contract: RobotContract,
    options: LoraOptions,
    processor: torch.device | str = "",
    made_for: Binding | None = None,
) -> tuple[AnyPolicy, Lora]:
    """Load a base, check it against the robot, attach an empty adapter.

    Args:
        folder: The base policy's folder.
        contract: The robot.
        options: The adapter's shape.
        processor: A device or its name; "" for the one that RATCHET_DEVICE names, see `policy.device.choose`.
        made_for: What the adapter with this shape is bound to. It is checked before the layers are attached, because
            another base may not even have them.

    Raises:
        RatchetError: adapter.wrong_base, adapter.wrong_statistics, adapter.wrong_action_space, and what loading, the
            compatibility check and `attach` raise.
    """
    policy = adopted.load(folder, processor if isinstance(processor, torch.device) else device.choose(processor))
    require_compatible(policy.spec, contract)
    if made_for is not None:
        binding_of(policy).require(made_for, where=str(folder))
    return policy, attach(policy.module, lora_config(options.rank, options.alpha, options.targets), seed=options.seed)


def lora_of(store: FolderStore, reference: str) -> LoraOptions:
    """Return the shape of a stored adapter's layers; the default shape for the base."""
    if store.resolve(reference) == BASE:
        return LoraOptions()
    config = room_for(store.get(reference).config)
    return LoraOptions(rank=config.r, alpha=float(config.lora_alpha), targets=str(config.target_modules))


def made_for(store: FolderStore, reference: str) -> Binding | None:
    """Return what a stored adapter is bound to; None for the base."""
    if store.resolve(reference) == BASE:
        return None
    return store.card(reference).binding


def open_running(
    folder: Path,
    contract: RobotContract,
    options: LoraOptions,
    store: FolderStore | None,
    processor: torch.device | str = "",
    made_for: Binding | None = None,
) -> Running:
    """Open a policy as `open_policy` does, for use with hot swaps from a store."""
    policy, lora = open_policy(folder, contract, options, processor, made_for)
    return Running(policy, HotSwapper(policy, lora, store=store), [])


def copy_adapter(store: FolderStore, source: FolderStore, reference: str) -> str:
    """Copy an adapter and its ancestors into another store, with what their cards say; returns its id."""
    # Oldest first, so that no card's parent is ever missing.
    for identity in reversed(source.lineage(reference)):
        store.put(source.get(identity), source.card(identity).provenance)
    return source.resolve(reference)


def share_base(policy: AnyPolicy, owner: AnyPolicy) -> int:
    """Let a policy read the owner's frozen weights instead of keeping its own; returns the bytes that this frees.

    Both must be the same base with LoRA layers, on one device, and nobody may change the base's weights afterwards.
    """
    frozen = {name: weight for name, weight in owner.module.named_parameters() if not weight.requires_grad}
    freed_bytes = 0
    for name, parameter in policy.module.named_parameters():
        if not parameter.requires_grad and name in frozen:
            parameter.data = frozen[name].data
            freed_bytes += parameter.nbytes
    return freed_bytes


def make_vector(
    policy: Policy, suite: str, contract: RobotContract, workers: int, slots: int, rollouts: str = "local"
) -> ChunkVectorEnv:
    """Start the simulators of a suite for a policy.

    Args:
        policy: Says which cameras and state fields are rendered, and how long a chunk is.
        suite: Name of the suite.
        contract: The robot.
        workers: Simulator processes.
        slots: Episodes at once in each process.
        rollouts: Where the processes run: "local", or on Ray: "local-ray" or the address of a cluster.
    """
    launch: Launcher = local_process
    if rollouts != "local":
        from ratchet_sim.workers.ray_actors import RayLauncher  # loads Ray, which few have

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
    """Look tasks up by name.

    Raises:
        RatchetError: sim.unknown_suite, sim.unknown_task.
    """
    registry.tasks(suite)
    return {name: registry.task(suite, name) for name in names}


def print_contract(console: Console, contract: RobotContract) -> None:
    """Print what the policy is allowed to do, before it does anything."""
    numbers = ("range per step", "velocity limit", "acceleration limit")
    title = f"contract {contract.name}  {contract.control_hz:g} Hz  id {contract.id[:12]}"
    table = display.make_table(("dimension", "unit", *numbers), title=title, numbers=numbers, framed=False)
    limits = contract.limits
    for dim, velocity, acceleration in zip(contract.action.dims, limits.velocity, limits.acceleration, strict=True):
        table.add_row(dim.name, dim.unit, f"{dim.low:g} … {dim.high:g}", f"{velocity:g}/s", f"{acceleration:g}/s²")
    console.print(table)
    cameras = ", ".join(
        f"{camera.name} {camera.width}x{camera.height} turned {camera.rotate}°" for camera in contract.cameras
    )
    console.print(f"cameras: {cameras}; workspace {limits.workspace_low} to {limits.workspace_high} m\n")


def describe_run(title: str, command: str, **entries: Any) -> dict[str, Any]:
    """Return the contents of run.json: enough to know later what was run, where and with what.

    Args:
        title: One line for people.
        command: The command line, to copy.
        entries: Further entries of the run's own.
    """
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
        **entries,
    }


def write_json(path: Path, data: Any) -> None:
    """Write a run folder's file: replaced as a whole, and what JSON has no type for as text."""
    documents.write_json(path, data, indent=1, durable=False, default=str)


def now() -> str:
    """Return the time in ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def command_line() -> str:
    """Return this process's command, to copy into a shell.

    A benchmark that calls a verb is named, not the verb.
    """
    if Path(sys.argv[0]).name == "ratchet":
        return shlex.join(["ratchet", *sys.argv[1:]])
    return shlex.join(["python", *sys.orig_argv[1:]])


def _computing() -> dict[str, str]:
    """Dtype in which a policy whose checkpoint declares bfloat16 computes here, and why."""
    choice = computing.choose(device.choose(), "bfloat16")
    return {"dtype": choice.name, "reason": choice.reason}
