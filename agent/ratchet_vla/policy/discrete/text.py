"""Prompts and tokenisers: an instruction in words becomes padded token ids.

Knows templates, padding and the tokenizer file. Knows no network.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from ratchet_vla.errors import RatchetError

OPENVLA_PROMPT = "In: What action should the robot take to {instruction}?\nOut: "


class Prompt:
    """Turns instructions into (B, L) ids and (B, L) mask.

    template: text with `{instruction}`; the instruction is lower-cased, as the published models expect.
    length: L for every prompt, padded directly after the first token, so that all shapes are fixed and the last prompt
        token is always the last position; 0 pads to the longest of the batch.
    end_token: id that every prompt ends with, or -1 for none (29871 in the published models).
    """

    def __init__(self, tokenizer: Tokenizer, template: str, *, bos: int, pad: int, end_token: int, length: int) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.bos = bos
        self.pad = pad
        self.end_token = end_token
        self.length = length
        self._ids = lru_cache(maxsize=4096)(self._encode)

    def __call__(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Raises RatchetError policy.bad_instruction for an empty or too long instruction."""
        rows = [self._ids(text) for text in instructions]
        length = self.length or max(len(r) for r in rows)
        ids = torch.full((len(rows), length), self.pad, dtype=torch.int64)
        mask = torch.zeros((len(rows), length), dtype=torch.bool)
        for i, row in enumerate(rows):
            rest = len(row) - 1
            ids[i, 0] = row[0]
            mask[i, 0] = True
            ids[i, length - rest :] = torch.tensor(row[1:])
            mask[i, length - rest :] = True
        return ids, mask

    def _encode(self, instruction: str) -> tuple[int, ...]:
        if not instruction.strip():
            raise RatchetError("policy.bad_instruction", "the instruction is empty", fix="say what the robot should do")
        text = self.template.format(instruction=instruction.strip().lower())
        ids = [self.bos, *self.tokenizer.encode(text, add_special_tokens=False).ids]
        if self.end_token >= 0 and ids[-1] != self.end_token:
            ids.append(self.end_token)
        if self.length and len(ids) > self.length:
            raise RatchetError(
                "policy.bad_instruction",
                f"the instruction takes {len(ids)} tokens, this model was made for {self.length}",
                where=instruction,
                fix="say it in fewer words",
            )
        return tuple(ids)


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE of at most `vocabulary` ids, with <pad> = 0 and <bos> = 1; any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(texts), trainer)
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Raises RatchetError policy.bad_checkpoint where the file is missing or broken."""
    if not path.is_file():
        raise RatchetError("policy.bad_checkpoint", "no tokenizer", where=str(path), fix="add tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise RatchetError("policy.bad_checkpoint", f"broken tokenizer: {error}", where=str(path)) from None
