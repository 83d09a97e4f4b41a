"""What the learner ordered, as it reaches whoever collects: its last word in a file, and a goal made of it.

Knows the order, the file that the courier keeps, and what a goal may add to it. Knows no socket, no node and no policy.
While the learner is away its last word stands.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ratchet_vla.errors import RatchetError
from ratchet_vla.link.rollout_requests import Order
from ratchet_vla.policy.noise import chunk_noise, derive_seed
from ratchet_vla.runtime.inference.source import Noise
from ratchet_vla.storage.documents import write_json

FILE = "learner.json"


@dataclass(frozen=True)
class Word:
    """The learner's state, as far as a collecting robot needs it. order: None while it wants no episodes."""

    phase: str
    mode: str
    order: Order | None


@dataclass(frozen=True)
class Goal:
    """What is run: the order's task, sampled as ordered. seed: of the noise; temperature 0 acts greedily."""

    task: str
    instruction: str
    horizon: int
    temperature: float
    seed: int
    noise: Noise | None = None
    adapter: str = ""
    order: str = ""


def write(folder: Path, state: Mapping[str, Any]) -> None:
    """Replace the learner's last word; exchanged at once. folder: the robot's."""
    word = {name: state.get(name) for name in ("run", "phase", "mode", "tags", "order")}
    write_json(folder / FILE, word, durable=False)


def read(folder: Path) -> Word:
    """The learner's last word. folder: the robot's. Raises RatchetError order.no_word, robot.bad_order."""
    path = folder / FILE
    try:
        raw = json.loads(path.read_text())
        if not isinstance(raw, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise RatchetError(
            "order.no_word",
            "the learner has not said yet what it wants",
            where=str(path),
            fix="start it, and the courier; `ratchet status --robot` says how the link is",
        ) from error
    return Word(str(raw.get("phase")), str(raw.get("mode")), Order.of(raw))


def ordered(
    word: Word,
    *,
    task: str = "",
    instruction: str = "",
    horizon: int = 0,
    temperature: float | None = None,
    seed: int = 0,
    active: str,
    episode: str,
) -> Goal:
    """The goal of one episode that the learner can use.

    task, instruction, horizon, temperature, seed: what the person asked for; empty, 0 and None take the order's. seed
    0 gives each episode noise of its own: two episodes share it only where a seed is asked for. active: id of the
    adapter in force. episode: its name, unique (a session's id is part of it).

    Raises:
        RatchetError: order.none, order.exact, order.other_task, order.other_instruction, order.greedy,
            order.other_temperature, order.other_adapter; nothing of the episode could enter an update.
    """
    order = word.order
    if order is None:
        raise RatchetError(
            "order.none",
            f"the learner wants no episodes now, it is {word.phase}",
            fix="wait for it (`ratchet status --robot`), or run with --mode deploy, which is not learned from",
        )
    if order.slots:
        raise RatchetError(
            "order.exact",
            "the learner orders exact simulated episodes, which only `ratchet robot` can run",
            where=order.task,
            fix="start the learner with --mode robot",
        )
    if task and task != order.task:
        raise RatchetError(
            "order.other_task", f"the learner wants {order.task!r}, not {task!r}", fix="run what it wants"
        )
    if instruction and instruction != order.instruction:
        raise RatchetError(
            "order.other_instruction",
            f"the learner's words for {order.task!r} are {order.instruction!r}, not {instruction!r}",
            fix="leave the instruction out, or say it in the learner's words",
        )
    if temperature == 0.0:
        raise RatchetError(
            "order.greedy",
            "nothing can be learned from greedy episodes: they have no log-probabilities",
            where=order.task,
            fix=f"leave the temperature out (the learner's is {order.temperature:g}), or run with --mode deploy",
        )
    if temperature is not None and abs(temperature - order.temperature) > 1e-6 * order.temperature:  # may be float32
        raise RatchetError(
            "order.other_temperature",
            f"the learner's temperature is {order.temperature:g}, not {temperature:g}",
            where=order.task,
            fix="leave the temperature out",
        )
    if active != order.adapter:
        raise RatchetError(
            "order.other_adapter",
            f"the learner wants episodes of {order.adapter[:12]}, {active[:12]} is active",
            where=order.task,
            fix="let the policy follow the store's `active`; it swaps as soon as the adapter is here",
        )
    return Goal(
        task=order.task,
        instruction=order.instruction,
        horizon=horizon or order.horizon,
        temperature=order.temperature,
        seed=seed or derive_seed(order.seed, "noise", episode),
        noise=partial(chunk_noise, correlation=order.noise_correlation) if order.noise_correlation else None,
        adapter=order.adapter,
        order=order.id,
    )


def free(task: str, instruction: str, horizon: int, temperature: float | None, seed: int, *, episode: str) -> Goal:
    """The goal of an episode that nobody ordered. temperature: None acts greedily. seed: 0 gives a sampled episode
    noise of its own."""
    sampled = temperature or 0.0
    own = seed or (derive_seed("noise", episode) if sampled > 0.0 else 0)
    return Goal(task, instruction, horizon, sampled, own)
