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

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from agent.errors import RatchetError
from sim import registry
from sim.base import Expert, TaskEnv


@dataclass(frozen=True)
class NoiseConfig:
    """Bursts of random motion.

    probability: chance per control step that a burst begins; length: steps of a burst, drawn from 1..length.
    scale: size of the random displacement as a share of each dimension's range; grip_flip: chance that a burst also
        inverts the gripper command.
    """

    probability: float = 0.08
    length: int = 5
    scale: float = 0.8
    grip_flip: float = 0.1


@dataclass
class Demonstrations:
    """M samples. images (M, V, H, W, 3) uint8; state (M, S) float32; actions (M, K, D) float32, physical units;
    task (M,) int64 index into `tasks` and `instructions`; start (M,) initial state id; scene (M, P) float32: where the
    objects and the goal are (`TaskEnv.scene`), P = 0 where that is not known."""

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
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("tasks", "instructions")}
        save_file(arrays, path, metadata={"tasks": "\n".join(self.tasks), "text": "\n".join(self.instructions)})

    @classmethod
    def load(cls, path: Path) -> Demonstrations:
        """Raises RatchetError learn.not_demonstrations for any file that `save` did not write."""
        try:
            with safe_open(path, "np") as file:
                meta = file.metadata() or {}
            return cls(**load_file(path), tasks=meta["tasks"].split("\n"), instructions=meta["text"].split("\n"))
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            raise RatchetError(
                "learn.not_demonstrations",
                f"no demonstrations are in it ({type(error).__name__})",
                where=str(path),
                fix="name a demonstrations.safetensors that `ratchet pretrain` or `learn --from demonstrations` wrote",
            ) from None

    @classmethod
    def concatenate(cls, parts: Sequence[Demonstrations]) -> Demonstrations:
        tasks = [t for p in parts for t in p.tasks]
        offsets = np.cumsum([0, *(len(p.tasks) for p in parts[:-1])])
        return cls(
            images=np.concatenate([p.images for p in parts]),
            state=np.concatenate([p.state for p in parts]),
            actions=np.concatenate([p.actions for p in parts]),
            task=np.concatenate([p.task + o for p, o in zip(parts, offsets, strict=True)]),
            start=np.concatenate([p.start for p in parts]),
            scene=np.concatenate([p.scene for p in parts]),
            tasks=tasks,
            instructions=[t for p in parts for t in p.instructions],
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

    states: a state that is named again is run again with other noise.
    stride: control steps between samples; frames are rendered for these alone.
    """
    samples: dict[str, list[np.ndarray]] = {"images": [], "state": [], "actions": [], "start": [], "scene": []}
    low = np.array([d.low for d in env.contract.action.dims], np.float32)
    high = np.array([d.high for d in env.contract.action.dims], np.float32)
    names = [d.name for d in env.contract.action.dims]
    middle = (low + high) / 2
    grip = names.index(env.contract.action.gripper.dim) if env.contract.action.gripper else None
    runs: Counter[int] = Counter()
    for initial in states:
        rng = np.random.default_rng([seed, initial, *([runs[initial]] if runs[initial] else [])])
        runs[initial] += 1
        env.reset(initial)
        expert.reset(env)
        frames: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        labels: list[np.ndarray] = []
        clean: list[bool] = []
        burst = 0
        push = np.zeros_like(low)
        phase = int(rng.integers(stride))
        for t in range(env.info.horizon):
            action = expert.act(env)
            if burst == 0 and rng.random() < noise.probability:
                burst = int(rng.integers(1, noise.length + 1))
                push = rng.uniform(-1, 1, len(low)).astype(np.float32) * noise.scale * (high - low) / 2
                flip = rng.random() < noise.grip_flip
            if t % stride == phase and burst == 0:
                state = env.state()
                frames[t] = (
                    np.stack([env.render(c) for c in cameras]),
                    np.concatenate([state[s] for s in state_fields]) if state_fields else np.zeros(0, np.float32),
                    env.scene(),
                )
            labels.append(action)
            clean.append(burst == 0)
            executed = action
            if burst:
                executed = np.clip(action + push, low, high)
                if grip is not None:
                    executed[grip] = 2 * middle[grip] - action[grip] if flip else action[grip]
                burst -= 1
            env.step(executed)
            if env.success():
                break
        if not env.success():
            continue
        # After success the arm would stay: the last action is repeated so that the final samples are whole.
        still = labels[-1].copy()
        labels += [still] * chunk
        clean += [True] * chunk
        for t, (image, state_vector, scene) in frames.items():
            if all(clean[t : t + chunk]):
                samples["images"].append(image)
                samples["state"].append(state_vector)
                samples["actions"].append(np.stack(labels[t : t + chunk]))
                samples["start"].append(np.int64(initial))
                samples["scene"].append(scene)
    if not samples["start"]:
        raise RatchetError(
            "sim.no_demonstrations",
            "the expert succeeded from none of the states",
            where=f"{env.info.suite}/{env.info.name}",
        )
    return Demonstrations(
        images=np.stack(samples["images"]),
        state=np.stack(samples["state"]).astype(np.float32),
        actions=np.stack(samples["actions"]).astype(np.float32),
        task=np.zeros(len(samples["start"]), np.int64),
        start=np.array(samples["start"], np.int64),
        scene=np.stack(samples["scene"]).astype(np.float32),
        tasks=[env.info.name],
        instructions=[env.info.instruction],
    )


def _work(job: tuple) -> Demonstrations:
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
    parts = []
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, maxtasksperchild=4) as pool:
        jobs = [(suite, task, tuple(states), options) for task in tasks]
        for part in pool.imap(_work, jobs):
            parts.append(part)
            if progress is not None:
                progress(part.tasks[0], len(part))
    return Demonstrations.concatenate(parts)
