"""Prompts of flow policies: an instruction, and for some the state in words, as token ids padded at the end.

Knows templates and the tokenizer. Knows no network.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ratchet_vla.errors import RatchetError

STATE_BINS = 256


class FlowPrompt:
    """Turns instructions into (B, L) ids and (B, L) mask.

    template: text with {instruction}, and with {state} where the state is said as bins of [-1, 1] (pi0.5).
    length: the longest prompt the model takes, and the length that fixed shapes have.
    """

    def __init__(self, tokenizer: Tokenizer, template: str, length: int) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.length = length
        self._ids = lru_cache(maxsize=4096)(self._encode)

    def __call__(
        self, instructions: Sequence[str], state: Tensor | None = None, *, fixed: bool = False
    ) -> tuple[Tensor, Tensor]:
        """state: (B, S) normalised, for templates that say it. fixed: pad to `length` whatever the batch holds.

        Raises:
            RatchetError: policy.bad_instruction for an empty or too long instruction.
        """
        said = [""] * len(instructions) if state is None else [" ".join(map(str, bins(row))) for row in state.cpu()]
        rows = [self._ids(text, words) for text, words in zip(instructions, said, strict=True)]
        length = self.length if fixed else max(len(r) for r in rows)
        ids = torch.zeros((len(rows), length), dtype=torch.int64)
        mask = torch.zeros((len(rows), length), dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = True
        return ids, mask

    def _encode(self, instruction: str, state: str) -> tuple[int, ...]:
        if not instruction.strip():
            raise RatchetError("policy.bad_instruction", "the instruction is empty", fix="say what the robot should do")
        text = instruction.strip()
        if "{state}" in self.template:
            text = text.replace("_", " ").replace("\n", " ")
        ids = self.tokenizer.encode(self.template.format(instruction=text, state=state)).ids
        if len(ids) > self.length:
            raise RatchetError(
                "policy.bad_instruction",
                f"the prompt takes {len(ids)} tokens, this model was made for {self.length}",
                where=instruction,
                fix="say it in fewer words",
            )
        return tuple(ids)


def bins(state: Tensor) -> list[int]:
    """(S,) normalised -> which of 256 equal parts of [-1, 1] each value lies in, as openpi counts them."""
    edges = torch.linspace(-1.0, 1.0, STATE_BINS + 1, dtype=torch.float64)[:-1]
    found: list[int] = (torch.bucketize(state.double(), edges, right=True) - 1).tolist()
    return found
