"""A small CNN without pretraining: the control for the large pretrained model. All of its weights move.

Source: arXiv 2603.11653, where sequential RL on a CNN of 12 M parameters neither learns as much nor keeps it. As the
VLA starts from a supervised checkpoint, so does the CNN: it imitates the demonstrations before the first task, because
a policy that never succeeds gives on-policy learning nothing to go by. With `warm_steps` 0 it starts from nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from ratchet_vla.adapters.lora.layers import Lora
from ratchet_vla.learner.methods.base import require_discrete
from ratchet_vla.learner.methods.full import FullFineTuning
from ratchet_vla.learner.supervised.training import PretrainConfig, Pretrainer, Samples
from ratchet_vla.policy.discrete.cnn import small_cnn
from ratchet_vla.policy.protocol import Policy


class SmallCNN(FullFineTuning):
    """Seq. FT on a network of its own.

    width: of its layers. warm_steps, warm_batch, warm_rate: steps, samples per step and learning rate of its start.
    """

    name = "small_cnn"
    needs_demonstrations = True

    def __init__(
        self,
        demonstrations: Samples | None = None,
        *,
        width: int = 512,
        warm_steps: int = 1000,
        warm_batch: int = 64,
        warm_rate: float = 1e-3,
    ) -> None:
        super().__init__(demonstrations)
        self.width = width
        self.warm_steps = warm_steps
        self.warm_batch = warm_batch
        self.warm_rate = warm_rate

    def bind(self, policy: Policy, lora: Lora, tasks: Sequence[str], seed: int) -> None:
        """Train a fresh CNN in place of the given policy, with its cameras, actions and statistics."""
        own_policy = small_cnn(require_discrete(policy), seed=seed % 2**31, width=self.width)
        super().bind(own_policy, lora, tasks, seed)

    def start(self, seed: int) -> None:
        """Imitate the demonstrations."""
        super().start(seed)
        if self.warm_steps:
            assert self.demonstrations is not None
            config = PretrainConfig(
                steps=self.warm_steps, batch=self.warm_batch, learning_rate=self.warm_rate, seed=self.seed % 2**31
            )
            Pretrainer(require_discrete(self.policy), self.parameters(), self.demonstrations, config).run()
