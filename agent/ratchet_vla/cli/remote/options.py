"""The way to a learner: the options that every verb with a robot shares, and a sync agent beside whatever runs.

Knows keys, folders and a command. Imports no model code: `ratchet up` starts in half a second.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ratchet_vla.link import keys as link_keys
from ratchet_vla.link.robot.outbox import Outbox
from ratchet_vla.paths import python_path

FOLDER = Path("runs/robot")
ADDRESS = "tcp://127.0.0.1:5544"
END_S = 15.0  # for a sync agent to end


@dataclass(kw_only=True)
class LearnerOptions:
    """How a robot reaches its learner."""

    name: str = "robot-1"
    """This robot's name, as on the learner's allow list."""
    keys: Path | None = None
    """File of this robot's secret key; keys/<name>/<name>.key_secret if absent."""
    learner_key: Path = Path("keys/learner/learner.key")
    """File of the learner's public key."""
    plain: bool = False
    """Connect without keys and encryption; only with an address on 127.0.0.1."""
    outbox_gib: float = 50.0
    """GiB of episodes that may wait for the learner; beyond it nothing more is collected."""
    reserve_gib: float = 2.0
    """GiB of disk that stay free for the rest of the machine."""

    @property
    def reserve(self) -> int:
        """Bytes of disk that stay free."""
        return int(self.reserve_gib * 1024**3)

    def check_keys(self) -> None:
        """Refuse what cannot connect, before anything is started. Raises RatchetError link.no_key and others."""
        self.pair()
        self.public()

    def pair(self) -> link_keys.KeyPair | None:
        """Load this robot's keys; None for a connection without. Raises RatchetError link.no_key and others."""
        return None if self.plain else link_keys.load(self.keys or Path("keys") / self.name / f"{self.name}.key_secret")

    def public(self) -> bytes | None:
        """Load the learner's public key; None for a connection without. Raises RatchetError link.no_key and others."""
        return None if self.plain else link_keys.load_public(self.learner_key)

    def outbox(self, folder: Path) -> Outbox:
        """Open the outbox in the robot's folder, within this robot's limits."""
        return Outbox(folder / "outbox", limit=int(self.outbox_gib * 1024**3), reserve=self.reserve)


def log_to_stderr(verbose: bool = False) -> None:
    """Let a service log what it does."""
    level = logging.DEBUG if verbose else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(name)s %(message)s")


def on_stop(act: Callable[[], object]) -> None:
    """Call this where the process is told to end (SIGTERM) or interrupted (SIGINT), instead of ending it at once."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: act())


def sync_command(options: LearnerOptions, address: str, folder: Path, episodes: Path, adapters: Path) -> list[str]:
    """Make the command of a sync agent for this robot, to run beside it and to end with this process."""
    command = [sys.executable, "-m", "ratchet_vla.cli.main", "sync", "--robot", str(folder), "--learner", address]
    command += ["--episodes", str(episodes), "--adapters", str(adapters), "--name", options.name]
    command += ["--outbox-gib", str(options.outbox_gib), "--reserve-gib", str(options.reserve_gib)]
    command += ["--parent", str(os.getpid())]
    if options.plain:
        return [*command, "--plain"]
    keys = [] if options.keys is None else ["--keys", str(options.keys)]
    return [*command, *keys, "--learner-key", str(options.learner_key)]


@contextmanager
def beside(command: list[str], log: Path) -> Iterator[None]:
    """Run a sync agent as long as this lasts; afterwards it has `END_S` seconds for what still waits."""
    environment = {**os.environ, "PYTHONPATH": python_path()}
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,  # an interrupt from the terminal ends it through this process, after the session
        )  # fmt: skip
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
