"""A learner and a robot small enough to be killed hundreds of times: real policy class, adapters, store, updates, gate,
link and files; a fake environment; processes made by fork, so that a restart costs milliseconds.

Used by `benchmarks/learner/faults.py` and by tests. What is fake is named so.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ratchet_sim.base import TaskInfo
from ratchet_vla.adapters.lora.layers import Lora, attach, lora_config
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.adapters.swap.hotswap import HotSwapper
from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.gate.decision import GateConfig
from ratchet_vla.learner.gate.keeper import Gatekeeper
from ratchet_vla.learner.service.collector import Collector
from ratchet_vla.learner.service.config import ServiceConfig
from ratchet_vla.learner.service.host import LearnerHost
from ratchet_vla.learner.service.learner import Gate
from ratchet_vla.learner.service.trainer import Trainer
from ratchet_vla.learner.update.step import UpdateConfig
from ratchet_vla.link import keys as link_keys
from ratchet_vla.link.robot.client import LinkClient
from ratchet_vla.link.robot.fetch import Fetcher
from ratchet_vla.link.robot.outbox import Outbox
from ratchet_vla.policy import presets
from ratchet_vla.policy.discrete.action_tokens import Statistics
from ratchet_vla.policy.discrete.policy import PrismaticPolicy
from ratchet_vla.policy.discrete.text import train_tokenizer
from ratchet_vla.records import ActionChunk, Episode, Observation, Step
from ratchet_vla.storage.files import Files

ROOT = Path(__file__).resolve().parents[2]
CHUNK, HORIZON = 4, 12
TASKS = {
    name: TaskInfo("fake", name, text, tuple(range(100, 110)), tuple(range(6)), HORIZON)
    for name, text in (("door-open", "open the door"), ("faucet-open", "open the faucet"), ("push", "push the puck"))
}
CONFIG = ServiceConfig(
    tasks=("door-open", "faucet-open"),
    updates=2,
    groups=2,
    group_size=4,
    temperature=1.0,
    noise_correlation=0.5,
    attempts=1,
    update=UpdateConfig(learning_rate=1e-2, minibatches=2),
)
GATE = GateConfig(episodes=4, min_episodes=4, new_task="not_worse", allowed_drop=1.0, significance=0.01)


def contract() -> RobotContract:
    return RobotContract.load(ROOT / "robots" / "metaworld.yaml")


def tiny_policy() -> tuple[PrismaticPolicy, Lora]:
    """Some 50,000 fixed random parameters whose motions sometimes reach the fake goal, with an empty adapter."""
    robot = contract()
    spec = presets.spec_for(robot, cameras=["corner2"], state=["hand", "gripper"], chunk=CHUNK, statistics_key="fake")
    low, high = (-0.02, -0.04, -0.04, -1.0), (0.06, 0.04, 0.04, 1.0)
    moves = (True, True, True, False)
    statistics = Statistics("fake", spec.action_units, low, high, moves, (0.0,) * 4, (0.1,) * 4)
    config = presets.small(hidden=32, layers=1, heads=2, channels=(8, 8, 8, 16), compute_dtype="float32")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = PrismaticPolicy(
            config, spec, statistics, train_tokenizer([t.instruction for t in TASKS.values()], 300)
        )
    return policy, attach(policy.module, lora_config(4, 4.0))


class FakeChunkEnv:
    """A one-dimensional reach in this process: actions move a position, success is 0.2 m. Frames encode the state."""

    def __init__(self, slots: int = 4) -> None:
        self.contract = contract()
        self.chunk = CHUNK
        self.groups = [range(slots)]
        camera = self.contract.camera("corner2")
        self.arrays: dict[str, Any] = {
            "images": np.zeros((slots, 1, camera.height, camera.width, 3), np.uint8),
            "state": np.zeros((slots, 4), np.float32),
            "steps_run": np.zeros(slots, np.int64),
            "done": np.zeros(slots, bool),
            "success": np.zeros(slots, bool),
        }
        self._horizon = [0] * slots
        self._steps = [0] * slots
        self._position = np.zeros((slots, 3))
        self._round: tuple[Mapping[int, tuple[str, int, int]], Mapping[int, Any]] = ({}, {})

    def submit(self, group: int, resets: Mapping[int, tuple[str, int, int]], steps: Mapping[int, Any]) -> None:
        self._round = (dict(resets), {s: np.array(c) for s, c in steps.items()})

    def collect(self, group: int) -> None:
        resets, steps = self._round
        a = self.arrays
        for slot, (_, state, horizon) in resets.items():
            self._position[slot] = (state % 7 * 0.001, 0.0, 0.0)
            self._steps[slot], self._horizon[slot] = 0, horizon
            a["done"][slot] = a["success"][slot] = False
        for slot, chunk in steps.items():
            ran = 0
            for action in chunk:
                self._position[slot] += np.asarray(action[:3], np.float64)
                ran, self._steps[slot] = ran + 1, self._steps[slot] + 1
                if self._position[slot, 0] > 0.2 or self._steps[slot] >= self._horizon[slot]:
                    break
            a["steps_run"][slot] = ran
            a["success"][slot] = self._position[slot, 0] > 0.2
            a["done"][slot] = a["success"][slot] or self._steps[slot] >= self._horizon[slot]
        for slot in (*resets, *steps):
            a["state"][slot, :3] = self._position[slot]
            a["images"][slot, 0, 0, 0, 0] = self._steps[slot]

    def close(self) -> None:
        self._round = ({}, {})


# -- a small exact episode file --------------------------------------------------------------------------------


def write_episode(path: Path, episode: Episode) -> None:
    """Arrays of all steps stacked, and JSON for the rest; plain .npz, nothing executable."""
    head = {f.name: getattr(episode, f.name) for f in dataclasses.fields(Episode) if f.name != "steps"}
    steps = episode.steps
    cameras, fields = sorted(steps[0].observation.images), sorted(steps[0].observation.state)
    head["steps"] = [
        [
            s.observation.stamp,
            s.observation.sequence,
            s.chunk.adapter_id,
            s.chunk.temperature,
            s.reward,
            s.done,
            s.steps_run,
        ]
        for s in steps
    ]
    head["cameras"], head["fields"] = cameras, fields
    arrays: dict[str, Any] = {f"image:{c}": np.stack([s.observation.images[c] for s in steps]) for c in cameras}
    arrays |= {f"state:{f}": np.stack([s.observation.state[f] for s in steps]) for f in fields}
    arrays |= {name: np.stack([getattr(s.chunk, name) for s in steps]) for name in ("actions", "tokens", "log_prob")}
    arrays["executed"] = np.stack([s.executed for s in steps])
    buffer = io.BytesIO()
    np.savez_compressed(buffer, head=np.frombuffer(json.dumps(head).encode(), np.uint8), **arrays)
    path.write_bytes(buffer.getvalue())


def read_episode(path: Path) -> Episode:
    """Raises RatchetError fake.unreadable."""
    try:
        with np.load(path, allow_pickle=False) as file:
            a = {name: file[name] for name in file.files}
        head = json.loads(a.pop("head").tobytes())
        rows, cameras, fields = head.pop("steps"), head.pop("cameras"), head.pop("fields")
        episode = Episode(**head)
        for i, (stamp, sequence, adapter, temperature, reward, done, ran) in enumerate(rows):
            seen = Observation(
                {c: a[f"image:{c}"][i] for c in cameras},
                {f: a[f"state:{f}"][i] for f in fields},
                episode.instruction,
                stamp,
                sequence,
            )
            chunk = ActionChunk(
                a["actions"][i], a["tokens"][i], a["log_prob"][i], adapter, temperature, stamp, sequence
            )
            episode.steps.append(Step(seen, chunk, a["executed"][i], reward, done, ran))
    except Exception as error:
        raise RatchetError("fake.unreadable", f"{type(error).__name__}: {error}", where=str(path)) from None
    return episode


# -- processes ---------------------------------------------------------------------------------------------------


@dataclass
class World:
    """Folders, keys and parts that both processes share; made before any fork."""

    root: Path
    config: ServiceConfig = CONFIG
    gate: GateConfig = GATE
    parts: dict[str, tuple[PrismaticPolicy, Lora]] = field(default_factory=dict)
    address: str = "tcp://127.0.0.1:*"

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self.parts.setdefault("learner", tiny_policy())
        self.parts.setdefault("server", tiny_policy())
        learner, robot = self.root / "keys" / "learner", self.root / "keys" / "robot"
        if not learner.exists():
            link_keys.make(learner, "learner")
            link_keys.make(robot, "robot-1")
            link_keys.allow(learner, robot / "robot-1.key")
        self.learner_keys = link_keys.load(learner / "learner.key_secret")
        self.robot_keys = link_keys.load(robot / "robot-1.key_secret")

    @property
    def learner_folder(self) -> Path:
        return self.root / "learner"

    @property
    def robot_folder(self) -> Path:
        return self.root / "robot"

    def host(self, files: Files | None = None, tamper: Any = None, **options: Any) -> LearnerHost:
        policy, lora = self.parts["learner"]
        serving, serving_lora = self.parts["server"]

        def make_gate(store: FolderStore) -> Gate:
            swapper = HotSwapper(serving, serving_lora, store=store)

            def serve(adapter: str) -> PrismaticPolicy:
                if swapper.current_id != (adapter or swapper.base_id):
                    swapper.swap(adapter or swapper.base_id)
                return serving

            keeper = Gatekeeper(serve, FakeChunkEnv(), TASKS, store, self.gate, self.learner_folder / "gate")
            return keeper.run

        options = {"reserve": 0, "tensorboard": False, "pause": 0.05, **options}
        trainer = Trainer(policy, lora, self.config, files)
        return LearnerHost(
            self.learner_folder, self.config, trainer, read_episode, make_gate, TASKS, address=self.address,
            keys=self.learner_keys, allow=self.root / "keys" / "learner", files=files, tamper=tamper, **options,
        )  # fmt: skip

    def robot(self, address: str, files: Files | None = None, tamper: Any = None, **options: Any) -> Robot:
        return Robot(self, address, files, tamper, **options)


class Robot:
    """The robot's side put together: outbox, link, store, swapper, collector."""

    def __init__(self, world: World, address: str, files: Files | None, tamper: Any, **options: Any) -> None:
        folder = world.robot_folder
        self.outbox = Outbox(folder / "outbox", reserve=0, files=files)
        try:
            self.store = FolderStore(folder / "adapters", create=True, files=files)
            policy, lora = world.parts["server"]
            self.swapper = HotSwapper(policy, lora, store=self.store)
            fetcher = Fetcher(self.store, folder / "incoming", reserve=0, files=files)
            options = {"beat": 0.1, "patience": 0.3, **options}
            self.client = LinkClient(
                address, "robot-1", self.outbox, keys=world.robot_keys, learner=world.learner_keys.public,
                fetcher=fetcher, tamper=tamper, **options,
            )  # fmt: skip

            def serve(adapter: str) -> PrismaticPolicy:
                if self.swapper.current_id != adapter:
                    self.swapper.swap(adapter)
                return policy

            self.collector = Collector(
                self.client, self.outbox, serve, lambda adapter: adapter in self.store.ids(), FakeChunkEnv(), TASKS,
                write_episode, folder / "spool", files=files,
            )  # fmt: skip
        except BaseException:
            self.outbox.close()
            raise

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        self.client.start()
        try:
            self.collector.run(until)
        finally:
            self.client.stop()
            self.outbox.close()

    def over(self) -> bool:
        return self.client.state.get("phase") == "done" and not len(self.outbox)


def forked(work: Callable[[], None], log: Path) -> int:
    """Run `work` in a forked process; returns its id. Exit status 0 for done, 3 for a refusal, 4 for anything else."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 4
    try:
        handle = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        torch.set_num_threads(1)
        work()
        status = 0
    except RatchetError as error:
        print(error, flush=True)
        status = 3
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def summary(journal: Sequence[Any]) -> dict[str, Any]:
    """What must be equal with and without faults: adapters of all updates, verdicts, and each update's episodes."""
    received = {e.data["sha"]: e.data["key"] for e in journal if e.kind == "received"}
    return {
        "adapters": [e.data["adapter"] for e in journal if e.kind == "updated"],
        "batches": [[received[sha] for sha in e.data["episodes"]] for e in journal if e.kind == "updated"],
        "verdicts": [(e.data["candidate"], e.data["decision"]) for e in journal if e.kind == "gated"],
        "promoted": [e.data["adapter"] for e in journal if e.kind == "promoted"],
        "finished": [(e.data["task"], e.data["learned"]) for e in journal if e.kind == "finished"],
    }
