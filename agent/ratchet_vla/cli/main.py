"""The command `ratchet`: one verb per file; this one picks the verb and prints errors.

Knows argument parsing and exit codes: 0 done, 1 a measured goal or check failed, 2 refused with a coded error, 130
interrupted, 141 where nobody reads the output any more.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import tyro
from rich.console import Console

from ratchet_vla.cli import former_names
from ratchet_vla.cli.computing import ComputingOptions
from ratchet_vla.errors import RatchetError

VERBS = (
    "demo",
    "eval",
    "inspect",
    "adopt",
    "learn",
    "pretrain",
    "reference",
    "plan",
    "adapters",
    "report",
    "episodes",
    "review",
    "run",
    "keys",
    "learner",
    "sync",
    "robot",
    "session",
    "status",
    "study",
    "calibrate",
    "doctor",
    "up",
    "ctl",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    Args:
        arguments: Words behind `ratchet`; those of this process if absent.
    """
    typed = list(sys.argv[1:] if arguments is None else arguments)
    words, renamed = former_names.translate(typed)
    if renamed:
        Console(stderr=True, soft_wrap=True).print(former_names.notice(renamed), markup=False, highlight=False)
    try:
        command = _parsed(words)
        for options in (command, getattr(command, "command", None)):  # a verb, or the sub-verb that it holds
            if isinstance(options, ComputingOptions):
                options.apply()
        return int(command.run())
    except RatchetError as error:
        if "--json" in words:
            print(json.dumps({"error": error.for_json()}))
        else:
            Console(stderr=True, soft_wrap=True).print(f"[bold red]refused[/] {_escape(str(error))}", highlight=False)
        return 2
    except BrokenPipeError:  # `ratchet … | head`: nobody reads on, and nobody needs to hear of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; the same command goes on from the last checkpoint")
        return 130


def _parsed(words: list[str]) -> Any:
    """Parse a verb with its options. All verbs are loaded only where none is named, for the list of them."""
    config = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff)
    if words and words[0] in VERBS:
        return tyro.cli(_loaded(words[0]), prog=f"ratchet {words[0]}", args=words[1:], config=config)
    return tyro.extras.subcommand_cli_from_dict(
        {verb: _loaded(verb) for verb in VERBS},
        prog="ratchet",
        description="Run a VLA on an arm and let it get better between sessions without losing what it could do.",
        args=words,
        config=config,
    )


def _loaded(verb: str) -> Any:
    """Import a verb's class only when it is needed: a verb that only sends files loads no simulator and no plots."""
    match verb:
        case "demo":
            from ratchet_vla.cli.learn import demo

            return demo.Demo
        case "eval":
            from ratchet_vla.cli.policy import evaluate

            return evaluate.Eval
        case "inspect":
            from ratchet_vla.cli.policy import inspection

            return inspection.Inspect
        case "adopt":
            from ratchet_vla.cli.policy import inspection

            return inspection.Adopt
        case "learn":
            from ratchet_vla.cli.learn import verb as learn

            return learn.Learn
        case "pretrain":
            from ratchet_vla.cli.learn import pretrain

            return pretrain.Pretrain
        case "reference":
            from ratchet_vla.cli.learn import reference

            return reference.Reference
        case "plan":
            from ratchet_vla.cli.policy import plan

            return plan.PlanCommand
        case "adapters":
            from ratchet_vla.cli.adapters import verbs as adapters

            return adapters.Adapters
        case "report":
            from ratchet_vla.cli.learn import report

            return report.Report
        case "episodes":
            from ratchet_vla.cli.episodes import verbs as episodes

            return episodes.Episodes
        case "review":
            from ratchet_vla.cli.episodes import review

            return review.Review
        case "run":
            from ratchet_vla.cli.policy import run

            return run.Run
        case "keys":
            from ratchet_vla.cli.remote import keys

            return keys.Keys
        case "learner":
            from ratchet_vla.cli.remote import learner

            return learner.Learner
        case "sync":
            from ratchet_vla.cli.remote import sync

            return sync.SyncAgent
        case "robot":
            from ratchet_vla.cli.remote import robot

            return robot.Robot
        case "session":
            from ratchet_vla.cli.remote import session

            return session.SessionCommand
        case "status":
            from ratchet_vla.cli.remote import status

            return status.Status
        case "study":
            from ratchet_vla.cli.study import verb as study

            return study.Study
        case "calibrate":
            from ratchet_vla.cli.calibrate import verbs as calibrate

            return calibrate.Calibrate
        case "doctor":
            from ratchet_vla.cli.nodes import doctor

            return doctor.Doctor
        case "up":
            from ratchet_vla.cli.nodes import up

            return up.Up
        case "ctl":
            from ratchet_vla.cli.nodes import ctl

            return ctl.Ctl
    raise KeyError(verb)


def _escape(text: str) -> str:
    """Keep rich from reading brackets as markup."""
    return text.replace("[", "\\[")


if __name__ == "__main__":
    raise SystemExit(main())
