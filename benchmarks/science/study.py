"""Sequential fine-tuning against other methods: success matrices over seeds, the four measures, the three claims.

Runs `ratchet study run` (hours; what is finished is not run again), or `ratchet study evaluate` on what it learned
(minutes), and keeps every evaluated episode's outcome in the JSON, and images beside it.
`--quick` trains nothing: it works the table out again from the outcomes that the JSON holds.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ratchet_sim import perturbations
from ratchet_vla.cli.common import describe_run
from ratchet_vla.cli.main import main as ratchet
from ratchet_vla.cli.study.folder import finished
from ratchet_vla.learner.measures.intervals import Interval, mean
from ratchet_vla.learner.measures.metrics import Cell, SuccessMatrix, difference
from ratchet_vla.learner.methods.registry import METHODS
from ratchet_vla.learner.study.claims import claims
from ratchet_vla.learner.study.page import forgetting_curves, heat_map, learning_curves
from ratchet_vla.learner.study.results import MEASURES, Trial, as_dict, over_seeds, summarise

ROOT = Path(__file__).resolve().parents[2]
PICK = "pick_up_the_{}_and_place_it_in_the_basket"
METAWORLD = [
    *["--tasks", "button-press", "handle-press", "coffee-button", "drawer-open", "plate-slide"],
    *["--held-out", "button-press-wall", "faucet-open", "window-open"],
    *["--updates", "8", "--groups", "24", "--group-size", "8", "--evaluation-episodes", "40"],
]
GRIDS: dict[str, list[str]] = {
    "metaworld": [
        *METAWORLD,
        *["--methods", "seq_ft", "oracle", "expansion", "ewc", "expert_replay", "full_ft", "supervised"],
        *["--seeds", "0", "1", "2"],
    ],
    "metaworld_settings": [
        *METAWORLD,
        *["--methods", "seq_ft", "seq_ft:until=0.9", "seq_ft:learning_rate=3e-3", "seq_ft:groups=48,updates=4"],
        *["seq_ft:order=reversed", "--seeds", "0", "1", "2"],
    ],
    "metaworld_reversed": [
        *METAWORLD,
        *["--methods", "seq_ft:order=reversed", "ewc:order=reversed", "full_ft:order=reversed"],
        *["seq_ft:rank=32,learning_rate=2e-3,order=reversed", "--seeds", "0"],
    ],
    "libero_object": [
        *["--suite", "libero_object", "--tasks", *(PICK.format(x) for x in ("tomato_sauce", "cream_cheese", "milk"))],
        *["--held-out", PICK.format("chocolate_pudding"), PICK.format("alphabet_soup")],
        *["libero_object_lan/" + PICK.format("tomato_sauce")],
        *["--methods", "seq_ft", "--seeds", "0", "--updates", "5", "--groups", "24", "--group-size", "4"],
        *["--evaluation-episodes", "20", "--evaluation-temperature", "1", "--horizon", "200", "--slots", "4"],
    ],
}

EVALUATIONS: dict[str, list[str]] = {  # of the study named before the underscore
    "metaworld_sampled": ["--methods", "seq_ft", "oracle", "--stages", "all", "--temperature", "1"],
    "metaworld_half": ["--methods", "seq_ft", "--scale", "0.5"],
    "metaworld_perturbed": ["--methods", "seq_ft", "--perturb", "camera", "light", "base"],
}


def packed(matrix: SuccessMatrix) -> dict[str, Any]:
    """Outcomes as one character per evaluation state, stage by stage; `unpacked` is the inverse."""
    outcomes = [
        {
            task: "".join("1" if ok else "0" for _, ok in sorted(cell.episodes.items(), key=lambda e: int(e[0][6:])))
            for task in matrix.columns
            if (cell := matrix.get(stage, task)) is not None
        }
        for stage in matrix.stages
    ]
    return {"tasks": list(matrix.tasks), "held_out": list(matrix.held_out), "outcomes": outcomes}


def unpacked(data: dict[str, Any]) -> SuccessMatrix:
    matrix = SuccessMatrix(tuple(data["tasks"]), tuple(data["held_out"]))
    for stage, row in enumerate(data["outcomes"]):
        for task, marks in row.items():
            matrix.record(stage, task, Cell.of({f"state-{i}": m == "1" for i, m in enumerate(marks)}))
    return matrix


def stored(path: Path) -> list[Trial]:
    """The trials of a result file, from the outcomes in it."""
    return [
        Trial(
            method,
            int(seed),
            unpacked(trial),
            float(trial["seconds"]),
            int(trial["episodes"]),
            sequential=METHODS[method.partition(":")[0]].sequential,
        )
        for method, row in json.loads(path.read_text())["methods"].items()
        for seed, trial in row["trials"].items()
    ]


def of_base(trials: list[Trial], names: tuple[str, ...]) -> Interval | None:
    """Mean success of the base over tasks. Greedy, all trials saw the same; sampled, each seed its own luck."""
    seen: list[tuple[list[Mapping[str, bool]], Interval]] = []
    for trial in trials:
        cells = [trial.matrix.get(0, name) for name in names]
        marks = [c.episodes for c in cells if c is not None]
        if marks and marks not in [m for m, _ in seen]:
            seen.append((marks, mean([c.rate for c in cells if c is not None])))
    return mean([rate for _, rate in seen]) if seen else None


def _cell(matrix: SuccessMatrix, task: str, which: int) -> Cell:
    found = matrix.get(matrix.stages[which], task)
    assert found is not None, f"{task} was not evaluated"
    return found


def judge(suite: str, trials: list[Trial]) -> bool:
    """Print the tables and the figure; whether Seq. FT's goals are met by their point estimates."""
    console = Console(width=100)
    table = Table(title=f"{suite}: points, 95 % intervals")
    for column in ("method", "seeds", *MEASURES):
        table.add_column(column, overflow="fold")
    first = trials[0].matrix
    base = {"AVG": of_base(trials, first.tasks), "ZS": of_base(trials, first.held_out)}
    table.add_row("base", "", *[v.percent() if (v := base.get(n)) else "-" for n in MEASURES])
    for s in summarise(trials):
        table.add_row(s.method, str(len(s.seeds)), *[v.percent() if (v := s.values[n]) else "-" for n in MEASURES])
    console.print(table)
    for kind in perturbations.KINDS:
        names = tuple(n for n in first.held_out if n.endswith(perturbations.MARK + kind))
        if names and (before := of_base(trials, names)):
            for method in dict.fromkeys(t.method for t in trials):
                mine = [t.matrix for t in trials if t.method == method]
                after = over_seeds([mean([_cell(m, n, -1).rate for n in names]) for m in mine], 0.0)
                gain = over_seeds([mean([difference(_cell(m, n, -1), _cell(m, n, 0)) for n in names]) for m in mine])
                print(f"{kind}: base {before.percent()}, {method} {after.percent()}, gain {gain.percent()}")
    row = next(t.method for t in trials if t.method.partition(":")[0] == "seq_ft")
    said_of = [c for c in claims(trials) if c.method == row and c.value is not None]
    said = "; ".join(f"{c.text} {c.value.percent()}" for c in said_of if c.value is not None)
    bounds = ", ".join(f"<= {100 * c.bound:.0f}" for c in said_of)
    print(f"study, {suite}: {row} {said} (goal {bounds})")
    return all(c.met for c in said_of)


def keep(suite: str, folder: Path, output: Path, **what: str) -> list[Trial]:
    """Write the result file and the images of a folder's finished trials; returns them."""
    trials = finished(folder)
    facts = describe_run(f"study on {suite}", f"python -m benchmarks.science.study {suite}", **what)
    result = as_dict(trials, facts)
    for method, row in result["methods"].items():
        del row["matrices"]
        row["trials"] = {
            str(t.seed): packed(t.matrix) | {"seconds": t.seconds, "episodes": t.episodes}
            for t in trials
            if t.method == method
        }
    result["claims"] = [c.as_dict() for c in claims(trials)]
    output.write_text(json.dumps(result, indent=1) + "\n")
    if suite in GRIDS:
        images = output.parent / output.stem
        images.mkdir(exist_ok=True)
        (images / "forgetting.png").write_bytes(forgetting_curves(trials))
        (images / "learning.png").write_bytes(learning_curves(trials))
        for method in dict.fromkeys(t.method for t in trials):
            name = re.sub("[^a-z0-9_.]+", "_", method)
            (images / f"{name}.png").write_bytes(heat_map([t for t in trials if t.method == method]))
    return trials


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", nargs="?", choices=[*GRIDS, *EVALUATIONS], default="metaworld")
    parser.add_argument("--out", type=Path, help="study folder; runs/study_SUITE if absent")
    parser.add_argument("--quick", action="store_true", help="train nothing: the table again, from the result file")
    parser.add_argument("--output", type=Path, help="result file; benchmarks/results/study_SUITE.json if absent")
    parser.add_argument(
        "--source", type=Path, help="what was learned, for an evaluation; runs/study_metaworld if absent"
    )
    options = parser.parse_args()
    suite = options.suite
    output = options.output or ROOT / "benchmarks" / "results" / f"study_{suite}.json"
    if options.quick:
        if not output.is_file():
            print(f"no {output}; leave out --quick to make it", file=sys.stderr)
            return 1
        return 0 if judge(suite, stored(output)) else 1
    folder = options.out or ROOT / "runs" / f"study_{suite}"
    if suite in GRIDS:
        source, what = folder, {"grid": " ".join(GRIDS[suite])}
        code = ratchet(["study", "run", *GRIDS[suite], "--out", str(folder)])
    else:
        source = options.source or ROOT / "runs" / f"study_{suite.partition('_')[0]}"
        what = {"evaluation": " ".join(EVALUATIONS[suite])}
        code = ratchet(["study", "evaluate", str(source), *EVALUATIONS[suite], "--out", str(folder)])
    if code:
        return code
    bases = {json.loads(p.read_text())["base_hash"] for p in source.glob("*/seed*/run.json")}
    trials = keep(suite, folder, output, base_hash=", ".join(sorted(bases)), **what)
    return 0 if judge(suite, trials) else 1


if __name__ == "__main__":
    raise SystemExit(main())
