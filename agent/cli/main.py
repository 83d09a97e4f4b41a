"""The command `ratchet`: one verb per file; this one only picks the verb and words refusals.

Knows argument parsing and exit codes: 0 done, 1 a measured goal or check failed, 2 refused with a coded reason, 130
interrupted, 141 where nobody reads the output any more.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

import tyro
from rich.console import Console

from agent.cli import (
    adapters,
    calibrate,
    courier,
    ctl,
    demo,
    doctor,
    episodes,
    evaluate,
    inspection,
    keys,
    learn,
    learner,
    plan,
    pretrain,
    report,
    review,
    robot,
    run,
    session,
    status,
    study,
    up,
)
from agent.cli.computing import ComputingOptions
from agent.errors import RatchetError


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    verbs = {
        "demo": demo.Demo,
        "eval": evaluate.Eval,
        "inspect": inspection.Inspect,
        "adopt": inspection.Adopt,
        "learn": learn.Learn,
        "pretrain": pretrain.Pretrain,
        "plan": plan.PlanCommand,
        "adapters": adapters.Adapters,
        "report": report.Report,
        "episodes": episodes.Episodes,
        "review": review.Review,
        "run": run.Run,
        "keys": keys.Keys,
        "learner": learner.Learner,
        "courier": courier.Courier,
        "robot": robot.Robot,
        "session": session.SessionCommand,
        "status": status.Status,
        "study": study.Study,
        "calibrate": calibrate.Calibrate,
        "doctor": doctor.Doctor,
        "up": up.Up,
        "ctl": ctl.Ctl,
    }
    try:
        command = tyro.extras.subcommand_cli_from_dict(
            verbs,  # type: ignore[arg-type]
            prog="ratchet",
            description="Run a VLA on an arm and let it get better between sessions without losing what it could do.",
            args=given,
            config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
        )
        for part in (command, getattr(command, "command", None)):
            if isinstance(part, ComputingOptions):
                part.apply()
        return int(command.run())
    except RatchetError as error:
        if "--json" in given:
            print(json.dumps({"error": error.as_dict()}))
        else:
            Console(stderr=True, soft_wrap=True).print(f"[bold red]refused[/] {_escape(str(error))}", highlight=False)
        return 2
    except BrokenPipeError:  # `ratchet … | head`: nobody reads on, and nobody needs to hear of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; the same command goes on from the last checkpoint")
        return 130


def _escape(text: str) -> str:
    return text.replace("[", "\\[")


if __name__ == "__main__":
    raise SystemExit(main())
