"""The learner's rollout request as it reaches whoever collects: the learner's status in a file, and a goal made of it.

Knows the request, the file that the sync agent keeps, and what a goal may add to it. Knows no socket, no node and no
policy. While the learner is away its last known status stands.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ratchet_vla.errors import RatchetError
from ratchet_vla.link.rollout_requests import RolloutRequest
from ratchet_vla.policy.noise import chunk_noise, derive_seed
from ratchet_vla.runtime.inference.source import Noise
from ratchet_vla.storage.documents import write_json

FILE = "learner.json"


@dataclass(frozen=True)
class LearnerStatus:
    """The learner's published state, as far as whoever collects needs it. request: None while it wants no episodes."""

    phase: str
    mode: str
    request: RolloutRequest | None


@dataclass(frozen=True)
class Goal:
    """What is run: the requested task, sampled as requested.

    request_id: "" where nobody requested it. seed: of the noise; temperature 0 acts greedily.
    """

    task: str
    instruction: str
    horizon: int
    temperature: float
    seed: int
    noise: Noise | None = None
    adapter: str = ""
    request_id: str = ""


def write(folder: Path, state: Mapping[str, Any]) -> None:
    """Replace the learner's last known status; exchanged at once. folder: the robot's."""
    status = {name: state.get(name) for name in ("run", "phase", "mode", "tags", "order")}
    write_json(folder / FILE, status, durable=False)


def read(folder: Path) -> LearnerStatus:
    """The learner's last known status. folder: the robot's. Raises RatchetError order.no_word, robot.bad_order."""
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
            fix="start it, and the sync agent (`ratchet sync`); `ratchet status --robot` says how the link is",
        ) from error
    return LearnerStatus(str(raw.get("phase")), str(raw.get("mode")), RolloutRequest.of(raw))


def requested(
    status: LearnerStatus,
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

    task, instruction, horizon, temperature, seed: what the operator asked for; empty, 0 and None take the request's.
    seed 0 gives each episode noise of its own: two episodes share it only where a seed is asked for. active: id of the
    adapter in force. episode: its name, unique (a session's id is part of it).

    Raises:
        RatchetError: order.none, order.exact, order.other_task, order.other_instruction, order.greedy,
            order.other_temperature, order.other_adapter; nothing of the episode could enter an update.
    """
    request = status.request
    if request is None:
        raise RatchetError(
            "order.none",
            f"the learner wants no episodes now, it is {status.phase}",
            fix="wait for it (`ratchet status --robot`), or run with --mode deploy, which is not learned from",
        )
    if request.slots:
        raise RatchetError(
            "order.exact",
            "the learner requests exact simulated episodes, which only `ratchet robot` can run",
            where=request.task,
            fix="start the learner with --mode robot",
        )
    if task and task != request.task:
        raise RatchetError(
            "order.other_task", f"the learner wants {request.task!r}, not {task!r}", fix="run what it wants"
        )
    if instruction and instruction != request.instruction:
        raise RatchetError(
            "order.other_instruction",
            f"the learner's words for {request.task!r} are {request.instruction!r}, not {instruction!r}",
            fix="leave the instruction out, or say it in the learner's words",
        )
    if temperature == 0.0:
        raise RatchetError(
            "order.greedy",
            "nothing can be learned from greedy episodes: they have no log-probabilities",
            where=request.task,
            fix=f"leave the temperature out (the learner's is {request.temperature:g}), or run with --mode deploy",
        )
    # A goal's temperature may have been a float32 on its way here.
    if temperature is not None and abs(temperature - request.temperature) > 1e-6 * request.temperature:
        raise RatchetError(
            "order.other_temperature",
            f"the learner's temperature is {request.temperature:g}, not {temperature:g}",
            where=request.task,
            fix="leave the temperature out",
        )
    if active != request.adapter:
        raise RatchetError(
            "order.other_adapter",
            f"the learner wants episodes of {request.adapter[:12]}, {active[:12]} is active",
            where=request.task,
            fix="let the policy follow the store's `active`; it swaps as soon as the adapter is here",
        )
    return Goal(
        task=request.task,
        instruction=request.instruction,
        horizon=horizon or request.horizon,
        temperature=request.temperature,
        seed=seed or derive_seed(request.seed, "noise", episode),
        noise=partial(chunk_noise, correlation=request.noise_correlation) if request.noise_correlation else None,
        adapter=request.adapter,
        request_id=request.id,
    )


def unrequested(
    task: str, instruction: str, horizon: int, temperature: float | None, seed: int, *, episode: str
) -> Goal:
    """The goal of an episode that nobody requested. temperature: None acts greedily. seed: 0 gives a sampled episode
    noise of its own."""
    sampled = temperature or 0.0
    own = seed or (derive_seed("noise", episode) if sampled > 0.0 else 0)
    return Goal(task, instruction, horizon, sampled, own)
