"""Demonstrations from scripted experts: frames, states and the expert's next K actions.

Knows experts, noise and how a training sample is cut from an episode. Knows no model.
Noise is executed but never a label: bursts push the arm off the expert's path, and what is recorded is how the expert
comes back. A sample's K labels never span a burst.
"""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from ratchet_sim import registry
from ratchet_sim.base import Expert, TaskEnv
from ratchet_vla.errors import RatchetError


@dataclass(frozen=True)
class NoiseConfig:
    """Bursts of random motion.

    Attributes:
        probability: chance per control step that a burst begins.
        length: steps of a burst, drawn from 1..length.
        scale: size of the random displacement as a share of each dimension's range.
        grip_flip: chance that a burst also inverts the gripper command.
    """

    probability: float = 0.08
    length: int = 5
    scale: float = 0.8
    grip_flip: float = 0.1


@dataclass
class Demonstrations:
    """M samples.

    Attributes:
        images: (M, V, H, W, 3) uint8.
        state: (M, S) float32.
        actions: (M, K, D) float32, physical units.
        task: (M,) int64, index into `tasks` and `instructions`.
        start: (M,) initial state id.
        scene: (M, P) float32: where the objects and the goal are (`TaskEnv.scene`), P = 0 where that is not known.
    """

    images: np.ndarray
    state: np.ndarray
    actions: np.ndarray
    task: np.ndarray
    start: np.ndarray
    tasks: list[str]
    instructions: list[str]
    scene: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))

    def __post_init__(self) -> None:
        if not self.scene.size:
            self.scene = np.zeros((len(self.task), 0), np.float32)

    def __len__(self) -> int:
        return len(self.task)

    def save(self, path: Path) -> None:
        arrays = {
            field_spec.name: getattr(self, field_spec.name)
            for field_spec in fields(self)
            if field_spec.name not in ("tasks", "instructions")
        }
        save_file(arrays, path, metadata={"tasks": "\n".join(self.tasks), "text": "\n".join(self.instructions)})

    @classmethod
    def load(cls, path: Path) -> Demonstrations:
        """Raises RatchetError learn.not_demonstrations for any file that `save` did not write."""
        try:
            with safe_open(path, "np") as file:
                metadata = file.metadata() or {}
            return cls(
                **load_file(path), tasks=metadata["tasks"].split("\n"), instructions=metadata["text"].split("\n")
            )
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            raise RatchetError(
                "learn.not_demonstrations",
                f"no demonstrations are in it ({type(error).__name__})",
                where=str(path),
                fix="name a demonstrations.safetensors that `ratchet pretrain` or `learn --from demonstrations` wrote",
            ) from None

    @classmethod
    def concatenate(cls, parts: Sequence[Demonstrations]) -> Demonstrations:
        tasks = [name for part in parts for name in part.tasks]
        offsets = np.cumsum([0, *(len(part.tasks) for part in parts[:-1])])
        return cls(
            images=np.concatenate([part.images for part in parts]),
            state=np.concatenate([part.state for part in parts]),
            actions=np.concatenate([part.actions for part in parts]),
            task=np.concatenate([part.task + offset for part, offset in zip(parts, offsets, strict=True)]),
            start=np.concatenate([part.start for part in parts]),
            scene=np.concatenate([part.scene for part in parts]),
            tasks=tasks,
            instructions=[name for part in parts for name in part.instructions],
        )


def demonstrate(
    env: TaskEnv,
    expert: Expert,
    states: Sequence[int],
    *,
    cameras: Sequence[str],
    state_fields: Sequence[str],
    chunk: int,
    stride: int,
    noise: NoiseConfig,
    seed: int,
) -> Demonstrations:
    """Run the expert from each initial state and cut samples from the attempts that succeeded.

    Args:
        states: a state that is named again is run again with other noise.
        stride: control steps between samples; frames are rendered for these alone.
    """
    samples: dict[str, list[np.ndarray]] = {"images": [], "state": [], "actions": [], "scene": []}
    starts: list[int] = []
    low_limits = np.array([dim.low for dim in env.contract.action.dims], np.float32)
    high_limits = np.array([dim.high for dim in env.contract.action.dims], np.float32)
    dim_names = [dim.name for dim in env.contract.action.dims]
    mid_range = (low_limits + high_limits) / 2
    gripper_index = dim_names.index(env.contract.action.gripper.dim) if env.contract.action.gripper else None
    run_counts: Counter[int] = Counter()
    for initial_state in states:
        # The first run of a state is seeded by the state alone, a repeated one also by its number.
        generator = np.random.default_rng(
            [seed, initial_state, *([run_counts[initial_state]] if run_counts[initial_state] else [])]
        )
        run_counts[initial_state] += 1
        env.reset(initial_state)
        expert.reset(env)
        frames: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        labels: list[np.ndarray] = []
        undisturbed: list[bool] = []
        burst_left = 0
        displacement: np.ndarray = np.zeros_like(low_limits)
        # Samples begin at a random phase, so that no control step of the episode is systematically left out.
        sample_phase = int(generator.integers(stride))
        for step in range(env.info.horizon):
            action = expert.act(env)
            if burst_left == 0 and generator.random() < noise.probability:
                burst_left = int(generator.integers(1, noise.length + 1))
                displacement = (
                    generator.uniform(-1, 1, len(low_limits)).astype(np.float32)
                    * noise.scale
                    * (high_limits - low_limits)
                    / 2
                )
                flip_gripper = generator.random() < noise.grip_flip
            # Rendering dominates the cost, so frames are drawn for samples alone.
            if step % stride == sample_phase and burst_left == 0:
                measured = env.state()
                state_vector = np.zeros(0, np.float32)
                if state_fields:
                    state_vector = np.concatenate([measured[field_name] for field_name in state_fields])
                images = np.stack([env.render(camera) for camera in cameras])  # (V, H, W, 3)
                frames[step] = (images, state_vector, env.scene())
            labels.append(action)
            undisturbed.append(burst_left == 0)
            executed = action
            if burst_left:
                executed = np.clip(action + displacement, low_limits, high_limits)
                if gripper_index is not None:
                    executed[gripper_index] = action[gripper_index]
                    if flip_gripper:
                        executed[gripper_index] = 2 * mid_range[gripper_index] - action[gripper_index]
                burst_left -= 1
            env.step(executed)
            if env.success():
                break
        if not env.success():
            continue
        # After success the arm would stay: the last action is repeated so that the final samples are whole.
        last_label = labels[-1].copy()
        labels += [last_label] * chunk
        undisturbed += [True] * chunk
        for step, (image, state_vector, scene) in frames.items():
            # A chunk whose labels span a burst would teach a jump that the expert never makes.
            if all(undisturbed[step : step + chunk]):
                samples["images"].append(image)
                samples["state"].append(state_vector)
                samples["actions"].append(np.stack(labels[step : step + chunk]))
                starts.append(initial_state)
                samples["scene"].append(scene)
    if not starts:
        raise RatchetError(
            "sim.no_demonstrations",
            "the expert succeeded from none of the states",
            where=f"{env.info.suite}/{env.info.name}",
        )
    return Demonstrations(
        images=np.stack(samples["images"]),
        state=np.stack(samples["state"]).astype(np.float32),
        actions=np.stack(samples["actions"]).astype(np.float32),
        task=np.zeros(len(starts), np.int64),
        start=np.array(starts, np.int64),
        scene=np.stack(samples["scene"]).astype(np.float32),
        tasks=[env.info.name],
        instructions=[env.info.instruction],
    )


def _work(job: tuple[str, str, Sequence[int], dict[str, Any]]) -> Demonstrations:
    suite, task, states, options = job
    env = registry.make_env(suite, task)
    try:
        return demonstrate(env, registry.make_expert(suite, task), states, **options)
    finally:
        env.close()


def collect(
    suite: str,
    tasks: Sequence[str],
    states: Sequence[int],
    *,
    cameras: Sequence[str],
    state_fields: Sequence[str],
    chunk: int,
    stride: int = 2,
    noise: NoiseConfig | None = None,
    seed: int = 0,
    processes: int = 2,
    progress: Callable[[str, int], None] | None = None,
) -> Demonstrations:
    """Demonstrations of several tasks, gathered by worker processes; the result does not depend on their number."""
    options = {
        "cameras": tuple(cameras),
        "state_fields": tuple(state_fields),
        "chunk": chunk,
        "stride": stride,
        "noise": noise or NoiseConfig(),
        "seed": seed,
    }
    collected = []
    context = multiprocessing.get_context("spawn")
    # Spawned, not forked: an OpenGL context does not survive a fork. Replaced after four tasks, because simulators
    # leak.
    with context.Pool(processes, maxtasksperchild=4) as pool:
        jobs = [(suite, task, tuple(states), options) for task in tasks]
        for demonstrations in pool.imap(_work, jobs):
            collected.append(demonstrations)
            if progress is not None:
                progress(demonstrations.tasks[0], len(demonstrations))
    return Demonstrations.concatenate(collected)
