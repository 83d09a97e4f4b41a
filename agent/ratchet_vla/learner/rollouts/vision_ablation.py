"""Does a policy look at its cameras? The same episodes again, with the pictures of another episode.

Knows pictures per episode and decision, and how to word the comparison. Knows no simulator and no policy.
A policy that has only learned the average motion of each task succeeds as often on another episode's pictures, and no
success rate of its own betrays it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.measures.intervals import Interval, mean
from ratchet_vla.learner.measures.metrics import Cell, difference
from ratchet_vla.learner.rollouts.specs import EpisodeSpec
from ratchet_vla.records import UInt8


class OwnPictures:
    """For the first evaluation: every episode sees its own pictures, and they are kept.

    frames[e][k]: (V, H, W, 3) uint8, of episode e at its k-th decision.
    """

    def __init__(self, episodes: int) -> None:
        self.frames: list[list[UInt8]] = [[] for _ in range(episodes)]

    def __call__(self, episode: int, images: UInt8) -> UInt8:
        self.frames[episode].append(images)
        return images


class OtherPictures:
    """For the second: episode e sees what episode e + 1 saw at the same decision, its last picture once that had ended.

    Raises:
        RatchetError: sight.same_scene unless each episode and the next start from different states of one task.
    """

    def __init__(self, own: OwnPictures, specs: Sequence[EpisodeSpec]) -> None:
        self._donors = [(e + 1) % len(specs) for e in range(len(specs))]
        for spec, donor in zip(specs, self._donors, strict=True):
            other = specs[donor]
            if other.task != spec.task or other.initial_state == spec.initial_state:
                raise RatchetError(
                    "sight.same_scene",
                    "whether a policy looks shows only between episodes of one task from different initial states",
                    where=f"{spec.task}, state {spec.initial_state}",
                    fix="evaluate at least 2 episodes per task",
                )
        self._frames = own.frames
        self._decisions = [0] * len(specs)

    def __call__(self, episode: int, images: UInt8) -> UInt8:
        frames = self._frames[self._donors[episode]]
        decision = self._decisions[episode]
        self._decisions[episode] += 1
        return frames[min(decision, len(frames) - 1)]


@dataclass(frozen=True)
class Sight:
    """What the comparison says.

    loss: success with its own pictures minus success with others', mean over tasks; per_task: the same of each.
    verdict: "looks", "does not show that it looks", or "cannot be told" where it fails with its own pictures too.
    """

    loss: Interval
    per_task: Mapping[str, Interval]
    verdict: str

    def sentence(self) -> str:
        """The verdict in words, for a person."""
        fall = f"success falls by {self.loss.percent()} points with another episode's pictures"
        if self.verdict == "looks":
            return f"the policy looks: {fall}"
        if self.verdict == "cannot be told":
            return "whether the policy looks cannot be told: it hardly succeeds with its own pictures"
        return f"nothing shows that the policy looks: {fall}; it may move by heart"


def judge(own: Mapping[str, Cell], other: Mapping[str, Cell]) -> Sight:
    """own, other: the cells of both evaluations by task, on the same states and seeds.

    It looks where the 95 % interval of the loss lies above 0. Where the best task's own success could be below 10 %,
    there is nothing to lose.

    Raises:
        RatchetError: metrics.nothing_to_average without a task.
    """
    per_task = {name: difference(own[name], other[name]) for name in own}
    loss = mean(list(per_task.values()))
    if loss.low > 0:
        verdict = "looks"
    elif max(cell.rate.low for cell in own.values()) < 0.1:
        verdict = "cannot be told"
    else:
        verdict = "does not show that it looks"
    return Sight(loss, per_task, verdict)
