"""`ratchet keys make|allow|revoke|list`: who may talk to a learner."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from ratchet_vla.link import keys

LEARNER = Path("keys/learner")


@dataclass
class Make:
    """Make a key pair: <name>.key to give away, <name>.key_secret to keep on this machine."""

    name: Annotated[str, tyro.conf.Positional]
    """Whose key: `learner`, or the robot's name."""
    out: Path = Path("keys")
    """Folder that gets a subfolder of this name."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        pair = keys.make(self.out / self.name, self.name)
        folder = self.out / self.name
        if self.json:
            print(json.dumps({"name": pair.name, "public": pair.public.decode(), "folder": str(folder)}))
        else:
            Console().print(f"{folder}/{self.name}.key (give away) and {self.name}.key_secret (keep)", highlight=False)
        return 0


@dataclass
class Allow:
    """Let a robot in: put its public key on the learner's allow list."""

    key: Annotated[Path, tyro.conf.Positional]
    """The robot's public key, its .key file."""
    learner: Path = LEARNER
    """Folder of the learner's keys."""
    name: str = ""
    """Name of the robot; the name in the key file if absent."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        name = keys.allow(self.learner, self.key, self.name)
        print(json.dumps({"allowed": name}) if self.json else f"{name} may talk to the learner of {self.learner}")
        return 0


@dataclass
class Revoke:
    """Take a robot off the allow list; a running learner stops listening to it at once."""

    name: Annotated[str, tyro.conf.Positional]
    """The robot's name."""
    learner: Path = LEARNER
    """Folder of the learner's keys."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        keys.revoke(self.learner, self.name)
        print(json.dumps({"revoked": self.name}) if self.json else f"{self.name} is refused from now on")
        return 0


@dataclass
class List:
    """List the robots that are let in, with their public keys."""

    learner: Path = LEARNER
    """Folder of the learner's keys."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        keys_by_name = {name: key.decode() for key, name in keys.allowed(self.learner).items()}
        if self.json:
            print(json.dumps(keys_by_name))
        else:
            print("\n".join(f"{name:24s} {key}" for name, key in sorted(keys_by_name.items())) or "nobody is allowed")
        return 0


@dataclass
class Keys:
    """Make and manage the keys of the link between robot and learner (CURVE).

    Commands to copy:

        ratchet keys make learner

        ratchet keys make robot-1

        ratchet keys allow keys/robot-1/robot-1.key --learner keys/learner

        ratchet keys list --learner keys/learner

    Copy keys/learner/learner.key to the robot, keys/robot-1/robot-1.key to the learner. Secrets stay where they are.
    """

    command: Annotated[
        Annotated[Make, tyro.conf.subcommand("make")]
        | Annotated[Allow, tyro.conf.subcommand("allow")]
        | Annotated[Revoke, tyro.conf.subcommand("revoke")]
        | Annotated[List, tyro.conf.subcommand("list")],
        tyro.conf.arg(name=""),
    ]

    def run(self) -> int:
        return self.command.run()
