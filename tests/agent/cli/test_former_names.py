"""Scripts and unit files on robots call last year's verbs; after an update they must run on, and say what to change.

Pinned: a former verb, sub-verb or option becomes the present one and only where it stands as one; one line tells it,
whatever was renamed; every renaming of the table leads to a name that the command knows, and none hides a present one.
"""

from __future__ import annotations

import json

import pytest

from ratchet_vla.cli.former_names import RENAMINGS, Renaming, notice, translate
from ratchet_vla.cli.main import VERBS, main

POST = Renaming((), "post", "sync")
JUDGE = Renaming(("ctl",), "judge", "label")
PERSON = Renaming(("ctl", "label"), "--who-said", "--annotator")
SIGHT = Renaming(("eval",), "--sight", "--ablation")
TABLE = (POST, JUDGE, PERSON, SIGHT)


@pytest.mark.parametrize(
    ("typed", "present", "used"),
    [
        ([], [], []),
        (["post", "--robot", "x"], ["sync", "--robot", "x"], [POST]),
        (["sync"], ["sync"], []),
        (["ctl", "judge", "success"], ["ctl", "label", "success"], [JUDGE]),
        (["ctl", "judge", "--who-said", "Ada"], ["ctl", "label", "--annotator", "Ada"], [JUDGE, PERSON]),
        (["ctl", "label", "x", "--who_said=Ada"], ["ctl", "label", "x", "--annotator=Ada"], [PERSON]),
        (["eval", "--sight.steps", "3", "--sight"], ["eval", "--ablation.steps", "3", "--ablation"], [SIGHT]),
        # Named alike, but no verb and no option of this verb.
        (["ctl", "--task", "judge"], ["ctl", "--task", "judge"], []),
        (["eval", "--tasks", "post"], ["eval", "--tasks", "post"], []),
        (["ctl", "run", "judge"], ["ctl", "run", "judge"], []),
        (["run", "--sight"], ["run", "--sight"], []),
        (["eval", "--sights"], ["eval", "--sights"], []),
    ],
)
def test_only_what_was_renamed_changes(typed: list[str], present: list[str], used: list[Renaming]) -> None:
    assert translate(typed, TABLE) == (present, used)


def test_one_line_names_everything() -> None:
    assert notice([POST]) == "`ratchet post` is now `ratchet sync`; the old name goes with 0.3"
    assert notice([JUDGE, PERSON]) == (
        "`ratchet ctl judge` is now `ratchet ctl label`, `--who-said` is now `--annotator`; the old names go with 0.3"
    )


@pytest.mark.parametrize("renaming", RENAMINGS, ids=lambda r: " ".join((*r.verb, r.former)))
def test_every_renaming_leads_somewhere(renaming: Renaming, capsys: pytest.CaptureFixture[str]) -> None:
    """The former name is gone from the help of its verb, the present one is there, and the line is told once."""
    option = renaming.former.startswith("-")
    typed = [*renaming.verb, *([] if option else [renaming.former]), "--help"]
    with pytest.raises(SystemExit) as stopped:
        main(typed)
    assert stopped.value.code == 0
    told = capsys.readouterr()
    if option:
        assert renaming.present in told.out
        assert f"{renaming.former} " not in told.out
    else:
        assert " ".join(("usage: ratchet", *renaming.verb, renaming.present)) in told.out
        assert told.err.strip() == notice([renaming])
    assert renaming.former not in VERBS


def test_a_script_of_last_year_runs_on(capsys: pytest.CaptureFixture[str]) -> None:
    """Option and error code were both renamed: the refusal is the present one, and each says what it was."""
    assert main(["eval", "--tasks", "door-open", "--sight", "--episodes", "1", "--json"]) == 2
    told = capsys.readouterr()
    assert told.err.strip() == "`--sight` is now `--vision-ablation`; the old name goes with 0.3"
    error = json.loads(told.out)["error"]
    assert (error["code"], error["former_code"]) == ("vision_ablation.same_scene", "sight.same_scene")
