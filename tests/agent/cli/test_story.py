"""The whole story at an arm, told once with the commands of docs/story.md: people's verdicts are the only success.

Pinned: keys, a learner for a robot without a simulator, a courier, a policy that follows the store's `active`; episodes
judged by a person make an update, the gate that cannot measure holds, a person promotes, the running policy swaps,
learns once more and is rolled back; an episode of an older adapter is kept out. Learner and courier are processes; the
arm is the policy's process and a fake world. No sleeps: the test reads the learner's lines and waits on conditions.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.adapters.identity import binding_of
from agent.adapters.store import FolderStore
from agent.cli import common
from agent.cli.main import main
from agent.episodes.store import EpisodeStore
from agent.episodes.writer import write_episode
from agent.learner.episode_specs import EpisodeSpec
from agent.learner.rollouts import run_episodes
from agent.learner.samples import to_episodes
from agent.link.journal import read
from agent.runtime.policy_client import PolicyClient, PolicyLaunch
from sim import registry
from sim.vector import ChunkVectorEnv
from tests import fakes

ROOT = Path(__file__).resolve().parents[3]
CONTRACT = registry.contract_for("metaworld")
POLICY = common.policy_folder("metaworld", None)
LORA = common.LoraOptions(rank=4, alpha=4.0)
TASK = "button-press"


class Process:
    """`ratchet …` in a process of its own; its output is what the test waits on."""

    def __init__(self, arguments: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "agent.cli.main", *arguments.split()],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.said: list[str] = []

    def until(self, words: str) -> str:
        """Read on to the first line with these words."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)
            if words in line:
                return line
        raise AssertionError(f"ended without '{words}':\n{''.join(self.said)}")

    def end(self) -> int:
        self.process.terminate()
        self.said += self.process.communicate(timeout=60)[0].splitlines(keepends=True)
        return self.process.returncode


class Arm:
    """Stands for the nodes at the arm: runs what the policy process runs, in a fake world, and records it unjudged."""

    def __init__(self, folder: Path) -> None:
        self.policy, self.lora = common.open_policy(POLICY, CONTRACT, LORA)
        self.adapters = FolderStore(folder / "runs" / "robot" / "adapters")
        self.episodes = EpisodeStore(folder / "runs" / "episodes", create=True)
        self.folder, self.count = folder, 0
        self.env = ChunkVectorEnv(
            "metaworld", cameras=self.policy.spec.cameras, state_fields=self.policy.spec.state,
            chunk=self.policy.spec.chunk, workers=1, slots_per_worker=4, make_env=fakes.make_fake,
        )  # fmt: skip

    def collect(self, adapter: str, count: int) -> list[str]:
        """Episodes of this adapter, of which nobody has said how they went; their ids in the store."""
        self.lora.load(self.adapters.get(adapter).tensors)
        assert self.lora.adapter(binding_of(self.policy)).id == adapter
        info = registry.task("metaworld", TASK)
        specs = [EpisodeSpec(TASK, info.instruction, 0, 12, seed=self.count + n) for n in range(count)]
        self.count += count
        _, batch = run_episodes(self.policy, self.env, specs, temperature=1.0, adapter_id=adapter)
        assert batch is not None
        found = []
        for episode in to_episodes(batch, specs, self.policy, CONTRACT):
            path = self.folder / f"{len(self.episodes.cards())}.mcap"
            unjudged = dataclasses.replace(episode, success=None, success_source="")
            write_episode(path, unjudged, CONTRACT, mode="collect")
            found.append(self.episodes.copy_in(path).id)
        return found


@contextmanager
def processes(*made: Process) -> Iterator[None]:
    try:
        yield
    finally:
        for process in made:
            if process.process.poll() is None:
                process.process.kill()
                process.process.wait()


def eventually(client: PolicyClient, condition: Callable[[], bool]) -> None:
    with client._arrived:
        assert client._arrived.wait_for(condition, 120.0), client.status()


def test_the_story_at_an_arm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    allow = "keys allow keys/robot-1/robot-1.key --learner keys/learner"
    for command in ("keys make learner", "keys make robot-1", allow):
        assert main(command.split()) == 0
    shape = "--lora.rank 4 --lora.alpha 4 --reserve-gib 0"
    budget = "--mode robot --batch 4 --batch-when full --workers 0"
    learner = Process(f"learner --tasks {TASK} {budget} {shape} --out runs/learner --address {address}")
    folders = "--episodes runs/episodes --adapters runs/robot/adapters"
    courier = Process(f"courier {folders} --name robot-1 --learner {address} --reserve-gib 0")
    with processes(learner, courier):
        learner.until("collecting")
        courier.until("courier robot-1")
        options = {"policy": str(POLICY), "store": "runs/robot/adapters", "follow": "active", "rank": 4, "alpha": 4.0}
        with PolicyClient(CONTRACT, PolicyLaunch(options=options)) as client:
            # The adapter that is trained from acts as the base; the arm runs it under its own id.
            [ordered] = [e.data["adapter"] for e in read(Path("runs/learner/journal.jsonl")) if e.kind == "ordered"]
            eventually(client, lambda: client.adapter_id == ordered)
            arm = Arm(tmp_path)
            try:
                first = round_of(arm, client, learner, ordered)
                stale = arm.collect(ordered, 1)
                judge("success", stale)
                learner.until("collecting")
                second = round_of(arm, client, learner, first)
            finally:
                arm.env.close()
            assert len({ordered, first, second}) == 3
            assert main(["adapters", "rollback", "--store", "runs/learner/adapters", "--reason", "jerky"]) == 0
            learner.until(f"active was set to {first[:12]} by a person")
            eventually(client, lambda: client.adapter_id == first)
            learner.until(f"under {first[:12]}")
        assert learner.end() == 0
        assert courier.end() == 0
    capsys.readouterr()
    assert main(["status", "--learner", "runs/learner", "--story"]) == 0
    told = capsys.readouterr().out
    for words in (
        "success 2/4 (4 accepted)",
        "waiting for a person",
        "success 2/4 (4 accepted, 1 inbox.other_adapter)",
    ):
        assert words in told
    assert main(["status", "--learner", "runs/learner", "--json"]) in (0, 1)
    shown = json.loads(capsys.readouterr().out)
    assert (shown["active"], shown["kept_out"]) == (first, {"inbox.other_adapter": 1})
    card = FolderStore("runs/learner/adapters").card(second).provenance
    assert (card.parent, card.task, card.gate["decision"]) == (first, TASK, "hold")


def judge(verdict: str, ids: list[str]) -> None:
    assert main(["episodes", "judge", verdict, *ids, "--person", "ada", "--store", "runs/episodes"]) == 0


def round_of(arm: Arm, client: PolicyClient, learner: Process, adapter: str) -> str:
    """Four judged episodes, an update, a gate that cannot measure, a person who promotes; the adapter that came of it,
    in force at the arm."""
    episodes = arm.collect(adapter, 4)
    judge("success", episodes[:2])
    judge("failure", episodes[2:])
    learner.until("update ")
    learner.until(": hold")
    learner.until("waiting for a person")
    candidate = FolderStore("runs/learner/adapters").tags()["candidate"]
    promote = ["adapters", "promote", "candidate", "--store", "runs/learner/adapters", "--workers", "0", "--override"]
    assert main([*promote, "ten good runs on the arm"]) == 0
    learner.until(f"{candidate[:12]} is active, by a person")
    eventually(client, lambda: client.adapter_id == candidate)
    return candidate
