"""What two cores give: control steps per second and episodes per hour of a VLA that learns, and where the time goes.

Episodes are sampled as in training, with the built-in policy in the dtype that the device chooses, by one simulator
process and by two, and by two in the other dtype; rounds alternate. A dtype that the processor emulates gets fewer
episodes and rounds. A last round counts processor seconds by place: compiling, reset, physics, rendering, the policy,
the update. Simulator processes and the policy work at once, so that places add up to more than the clock shows.

    python -m benchmarks.learner.throughput [--quick] [--suites metaworld]

Exit 1 where a second simulator process makes a suite slower, or where the device's choice is slower than the other
dtype beyond the spread of five rounds.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness.dtypes import REPEATS, Verdict, in_turn, pair
from benchmarks.harness.results import machine
from ratchet_sim import registry
from ratchet_sim.base import TaskEnv
from ratchet_sim.workers.vector import ChunkVectorEnv
from ratchet_vla.adapters.lora.layers import Lora
from ratchet_vla.cli.common import LoraOptions, find_tasks, open_policy, policy_folder
from ratchet_vla.cli.recipes import DEMO
from ratchet_vla.contract import RobotContract
from ratchet_vla.learner.rollouts.batch import RolloutBatch
from ratchet_vla.learner.rollouts.collection import run_episodes
from ratchet_vla.learner.rollouts.specs import EpisodeSpec, training_specs
from ratchet_vla.learner.update.step import Updater
from ratchet_vla.policy.protocol import Chunks, Policy, PolicyInput

ROOT = Path(__file__).resolve().parents[2]
WORKERS = (1, 2)
PLACES = ("compile", "reset", "physics", "render", "policy", "update")
SUITES: dict[str, dict[str, Any]] = {
    "metaworld": {"task": "button-press", "groups": 12, "group_size": 8, "slots": 12, "horizon": 0},
    "libero_object": {
        "task": "pick_up_the_tomato_sauce_and_place_it_in_the_basket",
        "groups": 2,
        "group_size": 4,
        "slots": 4,
        "horizon": 200,
    },
}


class Counted:
    """Processor seconds and calls by place, of this process."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: defaultdict[str, int] = defaultdict(int)

    @contextmanager
    def __call__(self, place: str) -> Iterator[None]:
        began = time.process_time()
        try:
            yield
        finally:
            self.seconds[place] += time.process_time() - began
            self.calls[place] += 1

    def as_dict(self) -> dict[str, dict[str, float]]:
        return {place: {"seconds": self.seconds[place], "calls": self.calls[place]} for place in self.seconds}


_serial = itertools.count()


class CountedEnv(TaskEnv):
    """A task that counts what it costs and leaves the count in a file when it is closed."""

    def __init__(self, folder: Path, suite: str, task: str, contract: RobotContract) -> None:
        self.folder, self.count = folder, Counted()
        with self.count("compile"):
            self.env = registry.make_env(suite, task, contract)
        self.info, self.contract = self.env.info, self.env.contract

    def reset(self, initial_state: int) -> None:
        with self.count("reset"):
            self.env.reset(initial_state)

    def step(self, action: Any) -> None:
        with self.count("physics"):
            self.env.step(action)

    def success(self) -> bool:
        with self.count("physics"):
            return self.env.success()

    def render(self, camera: str) -> Any:
        with self.count("render"):
            return self.env.render(camera)

    def state(self) -> Any:
        return self.env.state()

    def simulator_state(self) -> Any:
        return self.env.simulator_state()

    def close(self) -> None:
        self.env.close()
        path = self.folder / f"{os.getpid()}-{next(_serial)}.json"
        path.write_text(json.dumps(self.count.as_dict()))


class CountedPolicy:
    """A policy that counts what its samples cost; everything else is the policy's own."""

    def __init__(self, policy: Policy, count: Counted) -> None:
        self._policy, self._count = policy, count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def sample(self, batch: PolicyInput, temperature: float, noise: torch.Tensor) -> Chunks:
        with self._count("policy"):
            return self._policy.sample(batch, temperature, noise)


def vector(policy: Policy, suite: str, workers: int, slots: int, make_env: Callable[..., TaskEnv]) -> ChunkVectorEnv:
    return ChunkVectorEnv(
        suite,
        cameras=policy.spec.cameras,
        state_fields=policy.spec.state,
        chunk=policy.spec.chunk,
        workers=workers,
        slots_per_worker=slots,
        make_env=make_env,
    )


def episodes(policy: Any, env: ChunkVectorEnv, specs: list[EpisodeSpec]) -> tuple[dict[str, float], RolloutBatch]:
    """One round: what it gave, and its episodes."""
    outcomes, batch = run_episodes(policy, env, specs, temperature=1.0, noise_correlation=0.9)
    assert batch is not None
    return {
        "episodes_per_hour": 3600 * len(specs) / outcomes.seconds,
        "steps_per_second": float(outcomes.steps.sum()) / outcomes.seconds,
        "seconds": outcomes.seconds,
    }, batch


def measure(suite: str, quick: bool) -> dict[str, Any]:
    """Rounds of one and two simulator processes and of the other dtype in turn, then one that is counted by place."""
    facts = SUITES[suite]
    slots = 4 if quick else facts["slots"]
    choice, other = pair()
    torch.manual_seed(0)
    policy, lora = open_policy(policy_folder(suite, None), registry.contract_for(suite), LoraOptions(), "cpu")
    task = find_tasks(suite, [facts["task"]])[facts["task"]]
    groups, size = (facts["groups"] // 2, 2) if quick else (facts["groups"], facts["group_size"])
    horizon = facts["horizon"]
    specs = training_specs(task, seed=0, stage=0, update=0, groups=groups, group_size=size, horizon=horizon)
    # As many episodes at once for one process as for two: the policy's batches are the same.
    envs = {w: vector(policy, suite, w, 2 * slots // w, registry.make_env) for w in WORKERS}
    share = specs[: max(2, len(specs) // 12)]
    found: dict[str, list[dict[str, float]]] = {}

    def work(dtype: str, workers: int, small: bool) -> int:
        """One round; returns its control steps."""
        with policy.computing_in(dtype):
            rates, batch = episodes(policy, envs[workers], share if small else specs)
        found.setdefault(f"{dtype} {workers}", []).append(rates)
        return int(batch.valid.sum())

    works = {f"{choice.name} {w}": functools.partial(work, choice.name, w) for w in WORKERS}
    works[f"{other} 2"] = functools.partial(work, other, 2)
    try:
        with policy.computing_in(choice.name):
            for env in envs.values():  # scenes are compiled and renderers made
                run_episodes(policy, env, specs[: env.num_envs], temperature=1.0)
            sides = in_turn(works, REPEATS, budget=8.0 if quick else 30.0)
    finally:
        for env in envs.values():
            env.close()
    rounds = {name: found[name][-len(side.seconds) :] for name, side in sides.items()}
    one, two = (rounds[f"{choice.name} {w}"] for w in WORKERS)
    verdict = Verdict(choice, other, {name: sides[f"{name} 2"] for name in (choice.name, other)})
    with policy.computing_in(choice.name):
        places = profile(policy, lora, suite, slots, specs)
    return {
        "task": facts["task"],
        "slots": 2 * slots,
        "episodes_per_round": len(specs),
        "workers": {"1": one, "2": two},
        "other_dtype": rounds[f"{other} 2"],
        "scaling": median(
            more["episodes_per_hour"] / fewer["episodes_per_hour"] for fewer, more in zip(one, two, strict=True)
        ),
        "dtypes": verdict.as_dict(),
        "profile": places,
    }


def profile(policy: Policy, lora: Lora, suite: str, slots: int, specs: list[EpisodeSpec]) -> dict[str, Any]:
    """Processor seconds by place over one update: its episodes by two simulator processes, and its gradient steps."""
    count = Counted()
    with tempfile.TemporaryDirectory() as name:
        make = functools.partial(CountedEnv, Path(name))
        env = vector(policy, suite, 2, slots, make)
        try:
            rates, batch = episodes(CountedPolicy(policy, count), env, specs)
        finally:
            env.close()
        parts = [json.loads(p.read_text()) for p in Path(name).iterdir()]
    recipe = DEMO["metaworld"]
    updater = Updater(policy, lora.trainable(), recipe.update, torch.Generator().manual_seed(0))
    began = time.perf_counter()
    with count("update"):
        updater.update(batch)
    update_seconds = time.perf_counter() - began
    places = {place: {"seconds": 0.0, "calls": 0.0} for place in PLACES}
    for part in [*parts, count.as_dict()]:
        for place, values in part.items():
            places[place]["seconds"] += values["seconds"]
            places[place]["calls"] += values["calls"]
    return {
        "episodes": len(specs),
        "decisions": len(batch.valid),
        "control_steps": int(batch.valid.sum()),
        "wall_seconds": {"episodes": rates["seconds"], "update": update_seconds},
        "processor": places,
    }


def tables(console: Console, found: dict[str, Any]) -> None:
    reason = next(iter(found.values()))["dtypes"]["reason"]
    rates = Table(title=f"A VLA that samples episodes, median over rounds (least to most)\n{reason}", box=None)
    for column in ("suite", "dtype", "simulators", "rounds", "control steps/s", "episodes/hour", "ratio"):
        rates.add_column(column, justify="left" if column in ("suite", "dtype") else "right")
    for suite, facts in found.items():
        made = facts["dtypes"]
        choice, other = made["choice"], next(name for name in made["sides"] if name != made["choice"])
        for dtype, workers, rounds, ratio in (
            (f"{choice}, chosen", "1", facts["workers"]["1"], ""),
            (f"{choice}, chosen", "2", facts["workers"]["2"], f"{facts['scaling']:.2f} x one simulator"),
            (other, "2", facts["other_dtype"], f"{1 / made['ratio']:.2f} x the choice"),
        ):
            per_hour = [r["episodes_per_hour"] for r in rounds]
            rates.add_row(
                suite,
                dtype,
                workers,
                str(len(rounds)),
                f"{median(r['steps_per_second'] for r in rounds):.0f}",
                f"{median(per_hour):.0f} ({min(per_hour):.0f} to {max(per_hour):.0f})",
                ratio,
            )
    console.print(rates)
    shares = Table(title="Where processor time goes: one update, episodes and gradient steps", box=None)
    for column in ("suite", *PLACES):
        shares.add_column(column, justify="left" if column == "suite" else "right")
    for suite, facts in found.items():
        places = facts["profile"]["processor"]
        whole = sum(p["seconds"] for p in places.values())
        shares.add_row(suite, *(f"{places[p]['seconds']:.1f} s {places[p]['seconds'] / whole:.0%}" for p in PLACES))
    console.print(shares)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="Meta-World alone, short rounds, under a minute")
    parser.add_argument("--suites", nargs="+", choices=list(SUITES), default=list(SUITES), help="only these")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/throughput.json")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    here = {**machine(), "gl": os.environ.get("MUJOCO_GL", "")}
    suites = list(SUITES)[:1] if arguments.quick else arguments.suites  # LIBERO compiles for a minute
    found = {suite: measure(suite, arguments.quick) for suite in suites}
    tables(Console(width=120), found)
    command = ["python", "-m", "benchmarks.learner.throughput", *(sys.argv[1:] if argv is None else argv)]
    result: dict[str, Any] = {"machine": here, "repeats": REPEATS, "suites": {}}
    if arguments.output.exists():
        before = json.loads(arguments.output.read_text())
        if before["machine"].get("processor") == here["processor"]:  # suites may be measured one after another
            result["suites"] = before["suites"]
    for suite, facts in found.items():
        spread = {
            workers: [min(r["episodes_per_hour"] for r in rs), max(r["episodes_per_hour"] for r in rs)]
            for workers, rs in facts["workers"].items()
        }
        result["suites"][suite] = {"command": command, "machine": here, "spread": spread, **facts}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    text = ", ".join(
        f"{suite} {median(r['episodes_per_hour'] for r in facts['workers']['2']):.0f} episodes per hour, "
        f"{facts['scaling']:.2f} times one simulator's"
        for suite, facts in found.items()
    )
    made = [facts["dtypes"] for facts in found.values()]
    ratios = " and ".join(f"{m['ratio']:.2f}" for m in made)
    print(
        f"throughput: {text} (goal > 1); {made[0]['choice']}, chosen here, {ratios} times as fast as the other "
        "dtype (goal: not slower beyond the spread)"
    )
    good = all(facts["scaling"] > 1 for facts in found.values())
    return 0 if good and not any(m["slower_beyond_the_spread"] for m in made) else 1


if __name__ == "__main__":
    sys.exit(main())
