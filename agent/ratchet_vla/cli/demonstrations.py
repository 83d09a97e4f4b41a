"""Files of demonstrations: where a run keeps them, how they are read, and how they are written whole.

Knows the file and the suites' initial states. Who records them and what they train is the verbs'.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ratchet_sim import registry
from ratchet_sim.demonstrations import Demonstrations
from ratchet_vla.errors import RatchetError

FILE = "demonstrations.safetensors"


def require_file(path: Path) -> None:
    """Refuse a file of demonstrations that the user named and that is not there.

    Raises:
        RatchetError: learn.no_demonstrations.
    """
    if not path.is_file():
        raise RatchetError("learn.no_demonstrations", "no such file", where=str(path), fix="name a file, or record")


def load_for(path: Path, tasks: Sequence[str], *, exactly: bool) -> Demonstrations:
    """Read the demonstrations that a run folder already has.

    Args:
        path: The file.
        tasks: Tasks that are needed.
        exactly: Whether these must be all of the file's tasks, in this order; else it may hold more.

    Raises:
        RatchetError: learn.changed_run, where they are of other tasks.
    """
    demonstrations = Demonstrations.load(path)
    fits = tuple(demonstrations.tasks) == tuple(tasks) if exactly else set(tasks) <= set(demonstrations.tasks)
    if not fits:
        raise RatchetError(
            "learn.changed_run",
            f"the folder holds demonstrations of other tasks: {', '.join(demonstrations.tasks)}",
            where=str(path),
            fix="use a new folder",
        )
    return demonstrations


def save_whole(demonstrations: Demonstrations, path: Path) -> None:
    """Write a file that is either absent or whole, also where the process is killed meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    demonstrations.save(scratch)
    scratch.rename(path)


def demonstration_states(suite: str, episodes: int, first: int) -> tuple[int, ...]:
    """Initial states for demonstrations, apart from the evaluation states; LIBERO's few are used in turn.

    Args:
        suite: Name of the suite.
        episodes: How many states.
        first: The first of them; below 0 for the suite's own demonstration states.
    """
    if first >= 0:
        return tuple(range(first, first + episodes))
    if suite == "metaworld":
        from ratchet_sim.metaworld.env import DEMONSTRATION_STATES  # loads the simulator

        return tuple(range(DEMONSTRATION_STATES[0], DEMONSTRATION_STATES[0] + episodes))
    states = registry.tasks(suite)[0].train_states
    return tuple(states[number % len(states)] for number in range(episodes))
