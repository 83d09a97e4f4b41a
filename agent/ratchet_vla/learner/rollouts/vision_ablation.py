"""Vision ablation: the same episodes evaluated again with the images of another episode of the task.

Knows images per episode and decision, and how to word the comparison. Knows no simulator and no policy.
A policy that only replays the average motion of each task succeeds as often on another episode's images, and its own
success rate does not show it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.measures.intervals import Interval, mean
from ratchet_vla.learner.measures.metrics import Cell, difference
from ratchet_vla.learner.rollouts.specs import EpisodeSpec
from ratchet_vla.records import UInt8


class OwnImages:
    """For the first evaluation: every episode sees its own images, and they are kept.

    frames[e][k]: (V, H, W, 3) uint8, of episode e at its k-th decision.
    """

    def __init__(self, episodes: int) -> None:
        self.frames: list[list[UInt8]] = [[] for _ in range(episodes)]

    def __call__(self, episode: int, images: UInt8) -> UInt8:
        """Keep an episode's images, (V, H, W, 3), and show them as they are."""
        self.frames[episode].append(images)
        return images


class OtherImages:
    """For the second: episode e sees what episode e + 1 saw at the same decision, its last image once that had ended.

    Raises:
        RatchetError: vision_ablation.same_scene unless each episode and the next start from different states of one
        task.
    """

    def __init__(self, own: OwnImages, specs: Sequence[EpisodeSpec]) -> None:
        self._donors = [(episode + 1) % len(specs) for episode in range(len(specs))]
        for spec, donor in zip(specs, self._donors, strict=True):
            donor_spec = specs[donor]
            if donor_spec.task != spec.task or donor_spec.initial_state == spec.initial_state:
                raise RatchetError(
                    "vision_ablation.same_scene",
                    "images must come from another episode of the same task with a different initial state",
                    where=f"{spec.task}, state {spec.initial_state}",
                    fix="evaluate at least 2 episodes per task",
                )
        self._frames = own.frames
        self._decisions = [0] * len(specs)

    def __call__(self, episode: int, images: UInt8) -> UInt8:
        """Show what the donor saw at its decision of the same number."""
        frames = self._frames[self._donors[episode]]
        decision = self._decisions[episode]
        self._decisions[episode] += 1
        return frames[min(decision, len(frames) - 1)]


@dataclass(frozen=True)
class VisionAblation:
    """Result of the comparison.

    Attributes:
        loss: success with its own images minus success with others', mean over tasks.
        per_task: the same for each task.
        verdict: "looks", "does not show that it looks", or "cannot be told" where it fails with its own images too.
            Named as in the JSON that `ratchet eval` prints.
    """

    loss: Interval
    per_task: Mapping[str, Interval]
    verdict: str

    def sentence(self) -> str:
        """The result in one sentence."""
        fall = f"success falls by {self.loss.percent()} points with another episode's images"
        if self.verdict == "looks":
            return f"the policy uses its cameras: {fall}"
        if self.verdict == "cannot be told":
            return "whether the policy uses its cameras cannot be told: it hardly succeeds with its own images"
        return f"nothing shows that the policy uses its cameras: {fall}; it may only replay a motion"


def compare(own: Mapping[str, Cell], other: Mapping[str, Cell]) -> VisionAblation:
    """Compare both evaluations. own, other: their cells by task, on the same states and seeds.

    The policy uses its cameras where the 95 % interval of the loss lies above 0. Where the best task's own success
    could be below 10 %, there is nothing to lose.

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
    return VisionAblation(loss, per_task, verdict)
