"""What lies in a folder where episodes were looked for and not found: whose files, and the command that mends it.

Knows how recordings, data sets and stores look from outside. Reads files up to their first message; changes nothing.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mcap.records import Chunk, Message, Metadata
from mcap.stream_reader import StreamReader

from ratchet_vla.episodes.file import format as fmt
from ratchet_vla.episodes.file.reader import RECORD_LIMIT, TORN_ERRORS
from ratchet_vla.errors import RatchetError
from ratchet_vla.storage.growing import in_use

Kind = Literal["episode", "unfinished", "recording", "nodes", "foreign", "broken"]
INDEX = "index.jsonl"
# Metadata that the ROS nodes' former recorder wrote before a file's first message.
FORMER_METADATA = {"episode", "contract"}
MAX_FILES = 20_000  # files to look at; a folder of more is told of as far as that


@dataclass(frozen=True)
class Found:
    """One kind of thing. what: how many and whose, in words. fix: the command that mends it, or what to do instead.

    passes: it becomes an episode by itself, once its recorder is done with it or starts again.
    fills: episodes that are recorded into the same folder would be taken for a part of it.
    """

    what: str
    fix: str
    passes: bool = False
    fills: bool = False


def kind_of(path: Path) -> tuple[Kind, str]:
    """What an MCAP file is, and of which robot where it tells.

    "episode": an episode of this project. "unfinished", "recording": one that was cut off, or is being written now.
    "nodes": of the ROS nodes' former recorder. "foreign": an MCAP of another program. "broken": no MCAP at all.
    """
    if path.name.endswith(fmt.OPEN_SUFFIX):
        return ("recording" if in_use(path) else "unfinished"), ""
    metadata_names: set[str] = set()
    try:
        with path.open("rb") as file:
            for record in StreamReader(file, emit_chunks=True, record_size_limit=RECORD_LIMIT).records:
                if isinstance(record, Metadata):
                    metadata_names.add(record.name)
                    if record.name == fmt.BEGIN_RECORD:
                        return "episode", _robot(record, str(path))
                elif isinstance(record, Chunk | Message):
                    break
    except (OSError, *TORN_ERRORS):
        return "broken", ""
    return ("nodes" if metadata_names >= FORMER_METADATA else "foreign"), ""


def mcap_files(root: Path) -> Iterator[Path]:
    """Every MCAP file below a folder, finished or not, in order; what is hidden is somebody's unfinished work."""
    return (path for path in _visible(root) if path.name.endswith((fmt.SUFFIX, fmt.OPEN_SUFFIX, ".mcap.part")))


def look(root: Path, entered_files: Iterable[str] = ()) -> list[Found]:
    """What is below `root` and not among the `known` files (relative to it), kind by kind; empty for nothing."""
    if root.is_file():
        return [_one_file(root)]
    surrounding_store = store_around(root)
    if surrounding_store is not None:
        return [
            Found(
                f"this is inside the store of episodes {surrounding_store}",
                f"name that one: {surrounding_store}",
                fills=True,
            )
        ]
    if not root.exists():
        return []
    entered_set = set(entered_files)
    kinds: Counter[Kind] = Counter()
    robots: Counter[str] = Counter()
    for path in mcap_files(root):
        if str(path.relative_to(root)) not in entered_set:
            kind, robot = kind_of(path)
            kinds[kind] += 1
            robots.update([robot] if robot else [])
    findings = [describe(kinds[kind], root, robots) for kind, describe in _DESCRIBERS.items() if kinds[kind]]
    findings += _others(root)
    if not findings and not entered_set:
        other_files = [other_path for other_path in _visible(root) if other_path.name != INDEX]
        if other_files:
            names = ", ".join(other_path.name for other_path in other_files[:3]) + (
                " …" if len(other_files) > 3 else ""
            )
            findings.append(Found(f"{_count(len(other_files), 'other file')} ({names})", "name the folder of a store"))
    return findings


def nothing_here(code: str, problem: str, root: Path, findings: list[Found]) -> RatchetError:
    """The refusal of a verb that found no episode."""
    fix = "name the folder that the recorder writes to"
    nearby_stores = _stores_below(root.parent) if root.parent.is_dir() else []
    if nearby_stores:
        fix += f", such as {nearby_stores[0]}"
    if findings:
        problem = f"{problem}, but {'; '.join(finding.what for finding in findings)}"
        fix = "; ".join(dict.fromkeys(finding.fix for finding in findings))
    return RatchetError(code, problem, where=str(root), fix=fix)


def store_around(root: Path) -> Path | None:
    """The store that a folder is a part of, such as one of a session; None where it is in none."""
    for folder in root.absolute().parents:
        if _is_store(folder):
            return folder if root.is_absolute() else Path(os.path.relpath(folder))
    return None


def require_room(root: Path) -> None:
    """Refuse a folder in which a new store would lie among other data, or in which there can't be one.

    Raises:
        RatchetError: episode.other_folder.
    """
    if (root / INDEX).exists():
        return
    findings = [finding for finding in look(root) if finding.fills]
    if findings:
        problem = f"episodes can't be recorded here: {'; '.join(finding.what for finding in findings)}"
        fixes = "; ".join(dict.fromkeys(finding.fix for finding in findings))
        raise RatchetError(
            "episode.other_folder",
            problem,
            where=str(root),
            fix=f"record into a new folder; for what lies here, {fixes}",
        )


def _stores_below(root: Path) -> list[Path]:
    """Stores of episodes one and two levels down."""
    indexes = [*root.glob(f"*/{INDEX}"), *root.glob(f"*/*/{INDEX}")]
    return sorted(index.parent for index in indexes if _is_store(index.parent))


def _is_store(folder: Path) -> bool:
    """Whether its index is one of episodes: others call their files so, too."""
    try:
        with (folder / INDEX).open("rb") as file:
            first_entry = json.loads(file.readline(1 << 16))
    except (OSError, ValueError):
        return False
    return isinstance(first_entry, dict) and first_entry.get("kind") == "store"


def _visible(root: Path) -> list[Path]:
    """Files below a folder in order, hidden ones and those in hidden folders left out."""
    paths = sorted(itertools.islice(root.rglob("*"), MAX_FILES))
    return [
        path
        for path in paths
        if not any(part.startswith(".") for part in path.relative_to(root).parts) and path.is_file()
    ]


# -- words -------------------------------------------------------------------------------------------------------


def _count(number: int, singular: str, plural: str = "") -> str:
    return f"{number} {singular if number == 1 else plural or singular + 's'}"


def _episodes(number: int, root: Path, robots: Counter[str]) -> Found:
    owners = ", ".join(f"{robot_count} of robot '{robot}'" for robot, robot_count in sorted(robots.items()))
    description = _count(number, "finished episode") + f" that no index names ({owners})"
    return Found(description, f"`ratchet episodes verify --recover --store {root}` enters them")


def _unfinished(number: int, root: Path, robots: Counter[str]) -> Found:
    return Found(
        _count(number, "episode that was cut off", "episodes that were cut off"),
        f"`ratchet episodes verify --recover --store {root}` finishes them",
        passes=True,
    )


def _recording(number: int, root: Path, robots: Counter[str]) -> Found:
    return Found(_count(number, "episode") + " being recorded now", "wait until it is over", passes=True)


def _nodes(number: int, root: Path, robots: Counter[str]) -> Found:
    return Found(
        _count(number, "recording") + " of the ROS nodes' former recorder",
        f"`ratchet episodes import {root} --store FOLDER` makes episodes of them",
        fills=True,
    )


def _foreign(number: int, root: Path, robots: Counter[str]) -> Found:
    return Found(
        _count(number, "MCAP file") + " of another program",
        "bags hold no decisions: bring such data as a LeRobot data set, with `ratchet episodes import`",
        fills=True,
    )


def _broken(number: int, root: Path, robots: Counter[str]) -> Found:
    return Found(_count(number, "file") + " named .mcap that can't be read as one", "move them away or copy them again")


_DESCRIBERS: dict[Kind, Callable[[int, Path, Counter[str]], Found]] = {
    "episode": _episodes,
    "unfinished": _unfinished,
    "recording": _recording,
    "nodes": _nodes,
    "foreign": _foreign,
    "broken": _broken,
}


def _others(root: Path) -> list[Found]:
    """Data sets and stores, in the folder itself and one level down."""
    findings = [
        Found(f"a store of episodes in {store}", f"name that one: {store}", fills=True) for store in _stores_below(root)
    ]
    for candidate in (root, *sorted(path for path in itertools.islice(root.iterdir(), MAX_FILES) if path.is_dir())):
        if (candidate / "meta/info.json").is_file():
            command = f"`ratchet episodes import {candidate}`"
            findings.append(Found(f"a LeRobot data set in {candidate}", command, fills=candidate == root))
        if (candidate / "objects").is_dir() and (candidate / "tags").is_dir():
            command = f"`ratchet adapters list --store {candidate}`"
            findings.append(Found(f"a store of adapters in {candidate}", command, fills=candidate == root))
    files = [path for suffix in ("hdf5", "h5") for path in sorted(root.glob(f"*.{suffix}"))]
    if files:
        findings.append(Found(_count(len(files), "HDF5 file"), f"`ratchet episodes import {files[0]}`"))
    return findings


def _one_file(path: Path) -> Found:
    if path.suffix in (".hdf5", ".h5"):
        return Found("it is an HDF5 file", f"`ratchet episodes import {path}`", fills=True)
    return Found("it is a file", "name the folder of a store", fills=True)


def _robot(record: Metadata, location: str) -> str:
    try:
        return str(fmt.EpisodeInfo.from_record(record.metadata, location).contract.get("name", "")) or "unnamed"
    except RatchetError:
        return "of another version"
