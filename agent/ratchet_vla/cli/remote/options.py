"""The way to a learner: the options that every verb with a robot shares, and a sync agent beside whatever runs.

Knows keys, folders and a command. Imports no model code: `ratchet up` starts in half a second.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ratchet_vla.link import keys as link_keys
from ratchet_vla.link.robot.outbox import Outbox
from ratchet_vla.paths import python_path

FOLDER = Path("runs/robot")
ADDRESS = "tcp://127.0.0.1:5544"
END = 15.0  # seconds for a sync agent to end


@dataclass(kw_only=True)
class LearnerOptions:
    """How a robot reaches its learner."""

    name: str = "robot-1"
    """This robot's name, as on the learner's allow list."""
    keys: Path | None = None
    """This robot's secret key; keys/<name>/<name>.key_secret if absent."""
    learner_key: Path = Path("keys/learner/learner.key")
    """The learner's public key."""
    plain: bool = False
    """No keys and no encryption; only with an address on 127.0.0.1."""
    outbox_gib: float = 50.0
    """GiB that may wait for the learner; beyond it nothing more is collected."""
    reserve_gib: float = 2.0
    """GiB of disk that stay free."""

    @property
    def reserve(self) -> int:
        """Bytes of disk that stay free."""
        return int(self.reserve_gib * 1024**3)

    def check_keys(self) -> None:
        """Refuse what cannot connect, before anything is started. Raises RatchetError link.no_key and others."""
        self.pair()
        self.public()

    def pair(self) -> link_keys.KeyPair | None:
        return None if self.plain else link_keys.load(self.keys or Path("keys") / self.name / f"{self.name}.key_secret")

    def public(self) -> bytes | None:
        return None if self.plain else link_keys.load_public(self.learner_key)

    def outbox(self, folder: Path) -> Outbox:
        return Outbox(folder / "outbox", limit=int(self.outbox_gib * 1024**3), reserve=self.reserve)


def sync_command(options: LearnerOptions, address: str, folder: Path, episodes: Path, adapters: Path) -> list[str]:
    """The command of a sync agent for this robot, to run beside it and to end with this process."""
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
    """Run a sync agent as long as this lasts; afterwards it has `END` seconds for what still waits."""
    environment = {**os.environ, "PYTHONPATH": python_path()}
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,  # an interrupt from the terminal ends it through this process, after the session
        )  # fmt: skip
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
