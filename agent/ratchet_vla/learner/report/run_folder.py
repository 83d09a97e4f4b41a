"""A run's folder, read: whatever it has, and one line for each thing that is missing or unreadable.

Knows the folder's files and their form. Knows no page and computes no figure.

The run folder (every file may be absent; the page then says so):

    run.json        what was run: {"title", "command", "seed", "method", "contract", "base_hash", "started", "finished",
                    "config": {...}, "host": {...}, "versions": {...}}; further keys are shown too
    matrix.json     `metrics.SuccessMatrix.save`
    updates.jsonl   one JSON object per update, in order: {"task", "update", "episodes", "successes", "loss",
                    "approx_kl", "entropy", "clip_fraction", "seconds_rollout", "seconds_update"}; further keys ignored
    videos/*.gif    named by `video_name`: NAME__before.gif and NAME__after.gif stand side by side
    adapters.json   list of {"stage", "task", "id", "parent", "tags"}, oldest first; further keys are shown too
    comparison.json of a stored adapter against its base, see `comparison`; most runs have none. The page is then
                    about it: a run that has it needs no matrix
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.measures.metrics import SuccessMatrix
from ratchet_vla.learner.report import comparison as report_comparison

__all__ = ["MOMENTS", "Run", "load_run", "video_name"]

MOMENTS = (("before", "after"), ("base", "adapter"))  # what stands side by side


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    comparison: as `report_comparison.shown` makes it, {} for most runs. missing: one line per file or part that is
    absent or unreadable.
    """

    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)
    matrix: SuccessMatrix | None = None
    updates: list[dict[str, Any]] = field(default_factory=list)
    videos: list[Path] = field(default_factory=list)
    adapters: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    comparison: dict[str, Any] = field(default_factory=dict)


def video_name(task: str, moment: str) -> str:
    """File name for a rollout's GIF. moment: one of `MOMENTS`, such as "before" or "after"."""
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', task)}__{moment}.gif"


def load_run(folder: Path) -> Run:
    """Read whatever the folder has.

    Raises:
        RatchetError: report.no_run where there is no such folder.
    """
    if not folder.is_dir():
        raise RatchetError("report.no_run", "no such run folder", where=str(folder), fix="name the folder of a run")
    # Every reader below appends to this list and goes on: a page with gaps helps more than no page.
    missing: list[str] = []
    run_facts = _read_json(folder / "run.json", dict, missing)
    adapters = [adapter for adapter in _read_json(folder / "adapters.json", list, missing) if isinstance(adapter, dict)]
    comparison = _read_comparison(folder / "comparison.json", missing)
    matrix = _read_matrix(folder / "matrix.json", missing, needed=not comparison)
    updates = _read_updates(folder / "updates.jsonl", missing)
    videos = sorted((folder / "videos").glob("*.gif"))
    if not videos:
        missing.append("videos: no GIF there")
    return Run(folder, run_facts, matrix, updates, videos, adapters, missing, comparison)


def _read_comparison(path: Path, missing: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return report_comparison.shown(_read_json(path, dict, missing))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        missing.append(f"{path.name}: not one of ours ({error!r})")
        return {}


def _read_matrix(path: Path, missing: list[str], *, needed: bool) -> SuccessMatrix | None:
    if not path.is_file():
        if needed:
            missing.append(f"{path.name}: not there")
        return None
    try:
        return SuccessMatrix.load(path)
    except RatchetError as error:
        missing.append(f"{path.name}: {error}")
        return None


def _read_updates(path: Path, missing: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        missing.append(f"{path.name}: not there")
        return []
    updates: list[dict[str, Any]] = []
    lines = path.read_text(errors="replace").splitlines()
    for line_number, line in enumerate(lines, start=1):
        try:
            update = json.loads(line)
        except ValueError:
            update = None
        if isinstance(update, dict):
            updates.append(update)
        elif line.strip():
            missing.append(f"{path.name}: line {line_number} is unreadable")
    if not lines:
        missing.append(f"{path.name}: empty")
    return updates


def _read_json(path: Path, kind: type, missing: list[str]) -> Any:
    """The file's content where it is of `kind`; otherwise an empty one, and a line in `missing`."""
    if not path.is_file():
        missing.append(f"{path.name}: not there")
        return kind()
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        missing.append(f"{path.name}: unreadable ({error})")
        return kind()
    if not isinstance(data, kind):
        missing.append(f"{path.name}: holds a {type(data).__name__}, expected a {kind.__name__}")
        return kind()
    return data
