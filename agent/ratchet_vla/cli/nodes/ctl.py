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
    """Namespace of the arm's nodes, such as /left; none if absent."""
    limit: float = 10.0
    """Seconds to wait for an answer."""
    json: bool = False
    """Print JSON."""

    def _ask(self, verb: str, **request: Any) -> Any:
        result = None
        for answer in ros.ask("ctl", {"verb": verb, "namespace": self.namespace, "limit": self.limit, **request}):
            if "result" in answer:
                result = answer["result"]
            elif not self.json:
                Console(stderr=True).print(_feedback_line(answer["feedback"]), highlight=False)
        return result

    def _show(self, result: Any) -> int:
        if self.json:
            print(json.dumps(result))
        elif isinstance(result, list):
            table = Table(*(result[0] if result else ("nothing",)))
            for row in result:
                table.add_row(*(str(value) for value in row.values()))
            Console().print(table)
        else:
            for name, value in result.items():
                Console(soft_wrap=True).print(f"{name}: {value}", highlight=False, markup=False)
        return 0


def _feedback_line(feedback: dict[str, Any]) -> str:
    cause = f" ({feedback['motion_cause']})" if feedback["motion_cause"] else ""
    return f"tick {feedback['tick']}: {feedback['motion']}{cause}, adapter {feedback['adapter_id'][:12]}"


@dataclass
class Status(_Common):
    """Show what policy, safety filter and scene are doing."""

    def run(self) -> int:
        return self._show(self._ask("status"))


@dataclass
class Lifecycle(_Common):
    """Show a node's lifecycle state, or change it."""

    node: Annotated[str, tyro.conf.Positional] = "policy_node"
    """Name of the node."""
    transition: Annotated[
        Literal["get", "configure", "activate", "deactivate", "cleanup", "shutdown"], tyro.conf.Positional
    ] = "get"
    """What to do: a lifecycle transition, or get to only show the state."""

    def run(self) -> int:
        return self._show(self._ask("lifecycle", node=self.node, transition=self.transition))


@dataclass
class Params(_Common):
    """Show a node's parameters with their descriptions; with a value, set one."""

    node: Annotated[str, tyro.conf.Positional] = "policy_node"
    """Name of the node."""
    name: Annotated[str, tyro.conf.Positional] = ""
    """Name of a parameter; all if absent."""
    value: Annotated[str | None, tyro.conf.Positional] = None
    """New value, as JSON or as a plain word; nothing is set if absent."""

    def run(self) -> int:
        return self._show(self._ask("parameters", node=self.node, name=self.name, value=self.value))


@dataclass
class Run(_Common):
    """Run one task and wait for its end; interrupt to cancel it.

    Exit status 0 where it was solved or nobody labelled it, 1 where it was not.
    """

    task: Annotated[str, tyro.conf.Positional] = ""
    """Name that the episode is recorded under; the task that the learner requested if absent."""
    instruction: str = ""
    """Instruction for the policy, in words; the one that the learner requested if absent."""
    horizon: int = 0
    """Control periods after which the episode ends; 0 takes the learner's rollout request, or the node's default."""
    mode: Literal["", "deploy", "collect"] = ""
    """How chunks are executed; the node's default if absent."""
    temperature: float | None = None
    """Sampling temperature; 0 takes the most likely action. If absent: what the learner requested in collect mode, else
    0."""
    seed: int = 0
    """Seed of the sampling; 0 gives every episode noise of its own."""
    expected_adapter: str = ""
    """Refuse unless the adapter with this id is active."""

    def run(self) -> int:
        options = ("task", "instruction", "horizon", "mode", "temperature", "seed", "expected_adapter")
        result = self._ask("run", progress=not self.json, **{name: getattr(self, name) for name in options})
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
    """List the adapters that could be swapped to."""

    def run(self) -> int:
        return self._show(self._ask("adapters"))


@dataclass
class Label(_Common):
    """Say how a recorded episode went; kept in the episode store with your name, and never overwritten."""

    label: Annotated[Literal["success", "failure", "discard"], tyro.conf.Positional] = tyro.MISSING
    """How it went; discard keeps the episode out of training and evaluation."""
    annotator: str = ""
    """Your name; kept with the label."""
    episode: str = ""
    """Id, a unique beginning of one, or name of the episode; the one that ended last if absent."""
    note: str = ""
    """Why; kept with the label."""

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
    """Declare that the cause of a latched fault is removed."""

    operator: Annotated[str, tyro.conf.Positional] = ""
    """Your name; stored with the event."""

    def run(self) -> int:
        return self._show(self._ask("clear", person=self.operator))


@dataclass
class Reset(_Common):
    """Put a simulated scene back to an initial state."""

    task: str = ""
    """Name of another task of the suite; the present one if absent."""
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
