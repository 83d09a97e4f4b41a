"""Which reference set a run uses, from the command line: the one beside the base, a file, or none.

Knows where a base keeps its set. The terms themselves are `ratchet_vla.learner.retention`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.retention.reference_set import FILE, ReferenceSet, load
from ratchet_vla.learner.retention.regulariser import Retention, RetentionConfig, reference_for
from ratchet_vla.policy.protocol import Policy

BESIDE_THE_BASE = "base"
NONE = "none"


@dataclasses.dataclass(frozen=True)
class Choice:
    """What holds the adapter. reference: "base" for the set beside the base, if there is one; a file; or "none"."""

    reference: str = NONE
    config: RetentionConfig = dataclasses.field(default_factory=RetentionConfig)

    def open(
        self, policy_folder: Path, policy: Policy, learned: Sequence[str], held_out: Sequence[str], micro_size: int
    ) -> Retention | None:
        """What a run on these tasks is held by; None for plain Seq. FT.

        Raises:
            RatchetError: reference.missing, reference.bad_file, reference.wrong_base, reference.empty.
        """
        if self.reference == NONE:
            return None
        reference_set = self._load(policy_folder)
        if reference_set is None:
            return None
        reference_set.require_base(policy.base_hash, self.reference)
        decisions = reference_for(reference_set.decisions, learned, held_out)
        return Retention(decisions, self.config, micro_size=micro_size, identity=reference_set.id)

    def _load(self, policy_folder: Path) -> ReferenceSet | None:
        if self.reference == BESIDE_THE_BASE:
            path = policy_folder / FILE
            return load(path) if path.is_file() else None
        return load(Path(self.reference))


def tell(console: Console, retention: Retention | None, choice: Choice) -> None:
    """Say what holds the adapter, or that nothing does."""
    if retention is not None:
        console.print(f"{retention.describe()}; reference set {retention.identity[:12]}", highlight=False)
    elif choice.reference == NONE:
        console.print("plain Seq. FT: no reference set holds what is not trained", highlight=False)
    else:
        console.print(
            "[yellow]no reference set beside this base: what is not trained may be lost. "
            "Make one with ratchet reference record[/]",
            highlight=False,
        )


def require_known(reference: str) -> None:
    """Raises RatchetError reference.missing before a simulator starts."""
    if reference not in (BESIDE_THE_BASE, NONE) and not Path(reference).is_file():
        raise RatchetError("reference.missing", "no such file", where=reference, fix="a file, or base, or none")
