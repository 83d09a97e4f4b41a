"""`ratchet ctl …`: talk to running nodes without the `ros2` command."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from ratchet_vla.cli.nodes import ros


@dataclass
class _Common:
    namespace: str = ""
    """Namespace of the arm's nodes, such as /left."""
    limit: float = 10.0
    """Seconds to wait for an answer."""
    json: bool = False
    """Print JSON."""

    def _ask(self, verb: str, **request: Any) -> Any:
        result = None
        for told in ros.ask("ctl", {"verb": verb, "namespace": self.namespace, "limit": self.limit, **request}):
            if "result" in told:
                result = told["result"]
            elif not self.json:
                Console(stderr=True).print(_line(told["feedback"]), highlight=False)
        return result

    def _show(self, result: Any) -> int:
        if self.json:
            print(json.dumps(result))
        elif isinstance(result, list):
            table = Table(*(result[0] if result else ("nothing",)))
            for row in result:
                table.add_row(*(str(v) for v in row.values()))
            Console().print(table)
        else:
            for name, value in result.items():
                Console(soft_wrap=True).print(f"{name}: {value}", highlight=False, markup=False)
        return 0


def _line(feedback: dict[str, Any]) -> str:
    cause = f" ({feedback['motion_cause']})" if feedback["motion_cause"] else ""
    return f"tick {feedback['tick']}: {feedback['motion']}{cause}, adapter {feedback['adapter_id'][:12]}"


@dataclass
class Status(_Common):
    """What policy, safety filter and scene are doing."""

    def run(self) -> int:
        return self._show(self._ask("status"))


@dataclass
class Lifecycle(_Common):
    """A node's lifecycle state, or a transition of it."""

    node: Annotated[str, tyro.conf.Positional] = "policy_node"
    """Name of the node."""
    transition: Annotated[
        Literal["get", "configure", "activate", "deactivate", "cleanup", "shutdown"], tyro.conf.Positional
    ] = "get"
    """Transition, or get."""

    def run(self) -> int:
        return self._show(self._ask("lifecycle", node=self.node, transition=self.transition))


@dataclass
class Params(_Common):
    """A node's parameters with descriptions; with a value, set one."""

    node: Annotated[str, tyro.conf.Positional] = "policy_node"
    """Name of the node."""
    name: Annotated[str, tyro.conf.Positional] = ""
    """Parameter; all if absent."""
    value: Annotated[str | None, tyro.conf.Positional] = None
    """New value, JSON or a word."""

    def run(self) -> int:
        return self._show(self._ask("parameters", node=self.node, name=self.name, value=self.value))


@dataclass
class Run(_Common):
    """Run one task and wait for its end; interrupt to cancel it.

    Exit status 0 where it was solved or nobody labelled it, 1 where it was not.
    """

    task: Annotated[str, tyro.conf.Positional] = ""
    """Name for the record; what the learner requested if absent."""
    instruction: str = ""
    """What the policy is told, in words; what the learner requested if absent."""
    horizon: int = 0
    """Control periods; 0 for the learner's rollout request or the node's default."""
    mode: Literal["", "deploy", "collect"] = ""
    """Chunk execution; empty for the node's default."""
    temperature: float | None = None
    """Sampling temperature; 0 acts greedily. If absent: what the learner requested in collect mode, else 0."""
    seed: int = 0
    """Seed of the sampling; 0 gives every episode noise of its own."""
    expected_adapter: str = ""
    """Refuse unless this adapter is active."""

    def run(self) -> int:
        names = ("task", "instruction", "horizon", "mode", "temperature", "seed", "expected_adapter")
        result = self._ask("run", progress=not self.json, **{n: getattr(self, n) for n in names})
        self._show(result)
        return 1 if result["outcome"] == "failure" or result["termination"] == "fault" else 0


@dataclass
class Swap(_Common):
    """Exchange the running adapter, also in motion."""

    reference: Annotated[str, tyro.conf.Positional] = "active"
    """Adapter id, tag, or base."""
    expected_id: str = ""
    """Refuse unless the reference resolves to this id."""

    def run(self) -> int:
        return self._show(self._ask("swap", reference=self.reference, expected_id=self.expected_id))


@dataclass
class Adapters(_Common):
    """What could be swapped to."""

    def run(self) -> int:
        return self._show(self._ask("adapters"))


@dataclass
class Label(_Common):
    """Say how a recorded episode went; kept in the episode store with your name, and never overwritten."""

    label: Annotated[Literal["success", "failure", "discard"], tyro.conf.Positional] = tyro.MISSING
    """discard: not to be used."""
    annotator: str = ""
    """Your name."""
    episode: str = ""
    """Id, a unique beginning of one, or name; the one that ended last if absent."""
    note: str = ""
    """Kept with it."""

    def run(self) -> int:
        # The nodes' side of an earlier release knows the request under these words.
        request = {"verdict": self.label, "person": self.annotator, "episode": self.episode, "note": self.note}
        return self._show(self._ask("judge", **request))


@dataclass
class Stop(_Common):
    """Press (or release) the software stop; it stays latched until `clear`. Never instead of the robot's own."""

    release: bool = False
    """Release it. Motion still needs `clear`."""

    def run(self) -> int:
        return self._show(self._ask("stop", pressed=not self.release))


@dataclass
class Clear(_Common):
    """Declare the cause of a latched fault removed."""

    operator: Annotated[str, tyro.conf.Positional] = ""
    """Your name; stored with the event."""

    def run(self) -> int:
        return self._show(self._ask("clear", person=self.operator))


@dataclass
class Reset(_Common):
    """Simulation: put the scene back."""

    task: str = ""
    """Another task of the suite; the present one if empty."""
    initial_state: int = 0
    """Id of an initial state."""

    def run(self) -> int:
        return self._show(self._ask("reset", task=self.task, initial_state=self.initial_state))


@dataclass
class Ctl:
    """Talk to running nodes: lifecycle, parameters, tasks, labels, adapters, stop.

    Commands to copy:

        ratchet ctl status

        ratchet ctl run door-open --instruction "open the door"

        ratchet ctl label success --annotator Ada

        ratchet ctl swap active

        ratchet ctl stop; ratchet ctl stop --release; ratchet ctl clear "Ada"
    """

    command: (
        Annotated[Status, tyro.conf.subcommand("status")]
        | Annotated[Run, tyro.conf.subcommand("run")]
        | Annotated[Swap, tyro.conf.subcommand("swap")]
        | Annotated[Adapters, tyro.conf.subcommand("adapters")]
        | Annotated[Label, tyro.conf.subcommand("label")]
        | Annotated[Stop, tyro.conf.subcommand("stop")]
        | Annotated[Clear, tyro.conf.subcommand("clear")]
        | Annotated[Reset, tyro.conf.subcommand("reset")]
        | Annotated[Lifecycle, tyro.conf.subcommand("lifecycle")]
        | Annotated[Params, tyro.conf.subcommand("params")]
    )

    def run(self) -> int:
        return self.command.run()
