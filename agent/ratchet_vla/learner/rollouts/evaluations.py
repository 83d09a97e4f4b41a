"""Evaluations that were made already: what a policy did in a list of episodes is measured once, and looked up later.

Knows what an evaluation is a function of, and a folder with one small file for each. Knows no policy, no simulator and
no schedule. Several processes may share a folder: a file appears whole or not at all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.measures.metrics import Cell
from ratchet_vla.learner.rollouts.specs import EpisodeSpec
from ratchet_vla.storage.documents import replacing


def key_of(base_hash: str, acting: str, contract: str, specs: Sequence[EpisodeSpec], temperature: float) -> str:
    """SHA-256 over all that the outcomes depend on.

    acting: id of the adapter, "" for the base. contract: the robot's contract id. temperature: of sampling; greedy
    episodes (0) do not depend on their noise, so their seeds do not count.
    """
    episodes = [dataclasses.astuple(spec if temperature > 0 else dataclasses.replace(spec, seed=0)) for spec in specs]
    identity = json.dumps([1, base_hash, acting, contract, temperature, episodes])
    return hashlib.sha256(identity.encode()).hexdigest()


class KnownEvaluations:
    """A folder of outcomes by key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str) -> Cell | None:
        """The outcomes under a key, None where nobody measured them.

        Raises:
            RatchetError: learn.bad_evaluation for a file that is not what `put` wrote.
        """
        path = self._path(key)
        try:
            return Cell.of(
                {
                    str(episode_key): _flag(success)
                    for episode_key, success in json.loads(path.read_text())["episodes"].items()
                }
            )
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError, RatchetError):
            raise RatchetError(
                "learn.bad_evaluation", "not the outcomes of an evaluation", where=str(path), fix="delete the file"
            ) from None

    def put(self, key: str, cell: Cell) -> None:
        """Keep the outcomes; a second measurement under a key replaces the first."""
        path = self._path(key)
        with replacing(path, scratch=path.with_suffix(f".{os.getpid()}.tmp")) as file:
            file.write(json.dumps({"episodes": dict(cell.episodes)}).encode())

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(value)
    return value
