"""The command line is how most people meet their episodes: what it prints is read by people and by scripts.

Pinned: every verb of `ratchet episodes` and the terminal side of `ratchet review` on a small store, JSON where scripts
ask for it, exit codes, and refusals before anything changes. Deterministic: seeded episodes, scripted input.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import h5py
import numpy as np
import pytest

from ratchet_vla.cli.main import main
from ratchet_vla.episodes.file.writer import write_episode
from ratchet_vla.episodes.library.annotations import Annotations
from ratchet_vla.episodes.library.store import EpisodeStore
from ratchet_vla.episodes.review.terminal import as_text, side_by_side
from tests.agent.episodes.samples import episode, small_contract

CONTRACT = small_contract(16)


@pytest.fixture
def store(tmp_path: Path) -> EpisodeStore:
    made = EpisodeStore(tmp_path / "store", create=True)
    for i, outcome in enumerate([True, None, None]):
        path = made.folder("s") / f"{i}.mcap"
        write_episode(path, episode(CONTRACT, seed=i, steps=3, success=outcome, task=f"task{i}"), CONTRACT, session="s")
        made.add(path)
    return made


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    code = main([str(w) for w in words])
    return code, capsys.readouterr().out


def test_list_and_show(store: EpisodeStore, capsys: pytest.CaptureFixture[str]) -> None:
    ids = list(store.cards())
    code, text = run(capsys, "episodes", "list", "--store", store.root)
    assert code == 0
    assert all(i[:10] in text for i in ids)
    assert "3 episodes" in text
    _, told = run(capsys, "episodes", "list", "--store", store.root, "--state", "unjudged", "--json")
    assert [e["id"] for e in json.loads(told)] == ids[1:]
    _, told = run(capsys, "episodes", "show", ids[0][:8], "--store", store.root, "--json")
    facts = json.loads(told)
    assert (facts["standing"]["state"], facts["steps"], facts["labels"]) == ("verified", 3, [])


def test_play(store: EpisodeStore, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, "episodes", "play", next(iter(store.cards())), "--store", store.root, "--columns", 20)
    assert code == 0
    assert len(re.findall(r"^ +\d\.\d\d s$", text, re.MULTILINE)) == 3
    assert "▀" in text
    assert run(capsys, "episodes", "play", "ffff", "--store", store.root)[0] == 2


def test_half_blocks_show_the_pixels() -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    image[:2] = (255, 0, 0)
    lines = as_text(image, 4).split("\n")
    assert len(lines) == 2
    assert lines[0].startswith("\x1b[38;2;255;0;0;48;2;255;0;0m")
    assert lines[1].startswith("\x1b[38;2;0;0;0;48;2;0;0;0m")
    assert side_by_side([image, image], 18).count("▀") == 2 * 8 * 4


def test_judge(store: EpisodeStore, capsys: pytest.CaptureFixture[str]) -> None:
    ids = list(store.cards())
    words = ["episodes", "label", "failure", ids[1], ids[2][:8], "--annotator", "Ada", "--store", store.root]
    assert run(capsys, *words)[0] == 0
    annotations = Annotations(store)
    assert [annotations.status(i).success for i in ids] == [True, False, False]
    assert run(capsys, "episodes", "label", "success", ids[1], "--annotator", " ", "--store", store.root)[0] == 2
    assert len(annotations.labels(ids[1])) == 1


def test_verify_and_recover(store: EpisodeStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "episodes", "verify", "--store", store.root)[0] == 0
    card = next(iter(store.cards().values()))
    whole = (store.root / card.file).read_bytes()
    (store.root / "s" / "cut.mcap.open").write_bytes(whole[:-200])
    code, told = run(capsys, "episodes", "verify", "--store", store.root, "--recover", "--json")
    facts = json.loads(told)
    assert (code, facts["sound"], len(facts["recovered"]), facts["damages"]) == (0, 4, 1, [])
    (store.root / card.file).write_bytes(whole[:-1])
    code, told = run(capsys, "episodes", "verify", "--store", store.root, "--json")
    assert code == 1
    assert [d["code"] for d in json.loads(told)["damages"]] == ["episode.damaged"]


def test_export_and_import(store: EpisodeStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = next(iter(store.cards()))
    words = ["episodes", "export", tmp_path / "a.hdf5", "--format", "hdf5", "--store", store.root]
    code, told = run(capsys, *words, "--json")
    assert (code, json.loads(told)["episodes"]) == (0, 1)
    words = ["episodes", "export", tmp_path / "set", first, "--options.codec", "h264", "--options.tolerance", "255"]
    assert run(capsys, *words, "--store", store.root)[0] == 0
    assert (tmp_path / "set/meta/info.json").exists()
    assert run(capsys, *words, "--store", store.root)[0] == 2, "there is something already"
    contract = tmp_path / "robot.yaml"
    text = (Path(__file__).resolve().parents[4] / "robots/libero.yaml").read_text()
    contract.write_text(text.replace("width: 128, height: 128", "width: 16, height: 16"))
    with h5py.File(tmp_path / "demo.hdf5", "w") as file:
        demo = file.create_group("data/demo_0")
        demo["actions"], demo["dones"] = np.zeros((2, 7)), np.zeros(2)
        for name, size in (("ee_pos", 3), ("ee_ori", 3), ("gripper_states", 2)):
            demo[f"obs/{name}"] = np.zeros((2, size))
        for name in ("agentview_rgb", "eye_in_hand_rgb"):
            demo[f"obs/{name}"] = np.zeros((2, 16, 16, 3), np.uint8)
    words = ["episodes", "import", tmp_path / "demo.hdf5", "--contract", contract, "--store", tmp_path / "new"]
    code, told = run(capsys, *words, "--json")
    assert (code, len(json.loads(told))) == (0, 1)


def test_gc_shows_before_it_deletes(store: EpisodeStore, capsys: pytest.CaptureFixture[str]) -> None:
    ids = list(store.cards())
    Annotations(store).annotate(ids[1], "discard", "ada")
    _, told = run(capsys, "episodes", "gc", "--store", store.root, "--json")
    assert json.loads(told)["removed"] == [], "it is not old enough"
    os.utime(store.path(ids[1]), (0, 0))
    _, told = run(capsys, "episodes", "gc", "--store", store.root, "--json")
    assert (json.loads(told)["removed"], len(store.cards())) == ([ids[1]], 3)
    run(capsys, "episodes", "gc", "--store", store.root, "--apply")
    assert list(EpisodeStore(store.root).cards()) == [ids[0], ids[2]]


def test_rerun_is_optional(store: EpisodeStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["episodes", "export", str(tmp_path / "out"), "--format", "rrd", "--store", str(store.root)])
    assert code == 2
    assert "export.no_rerun" in capsys.readouterr().err


def test_labelling_in_the_terminal(
    store: EpisodeStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(["r", "f slipped at the end", "n"])
    monkeypatch.setattr("builtins.input", lambda _: next(answers))
    code, text = run(capsys, "review", "--terminal", "--annotator", "Ada", "--store", store.root, "--columns", 16)
    assert (code, "1 labelled" in text) == (0, True)
    _, second, third = store.cards()
    (label,) = Annotations(store).labels(second)
    assert (label.value, label.note, label.viewed.via, label.viewed.share) == (
        "failure",
        "slipped at the end",
        "terminal",
        1.0,
    )
    assert Annotations(store).labels(third) == []


def test_the_page_refuses_to_be_open_to_all(store: EpisodeStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["review", "--store", str(store.root), "--host", "0.0.0.0", "--no-token"]) == 2
    assert "review.no_token" in capsys.readouterr().err
