"""A verb that says "0 episodes" beside six recordings sends its user looking in the wrong place for an afternoon.

Pinned: what is told, and with which command, of every kind of thing that lies where episodes were expected; that no
verb makes an index, that none exits 0, that recovery passes over what it can't mend, and that nothing is recorded among
other data. Deterministic: files are written here.
"""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import pytest
from mcap.writer import Writer

from ratchet_vla.cli.main import main
from ratchet_vla.episodes.file.writer import write_episode
from ratchet_vla.episodes.library.store import EpisodeStore
from ratchet_vla.episodes.library.survey import INDEX, look, require_room
from ratchet_vla.errors import RatchetError
from ratchet_vla.storage.growing import GrowingFile
from tests.agent.episodes.samples import episode, small_contract

CONTRACT = small_contract(8)
VERBS = [
    ["episodes", "list", "--store"],
    ["episodes", "verify", "--store"],
    ["episodes", "verify", "--recover", "--store"],
    ["episodes", "gc", "--store"],
    ["episodes", "export", "out", "--store"],
    ["episodes", "show", "abcd", "--store"],
    ["episodes", "play", "abcd", "--store"],
    ["episodes", "label", "success", "abcd", "--annotator", "Ada", "--store"],
    ["review", "--terminal", "--annotator", "Ada", "--store"],
    ["sync", "--plain", "--episodes"],
]


def bag(path: Path, *metadata: str) -> None:
    """An MCAP of another recorder: these metadata records, then one message."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        writer = Writer(file)
        writer.start(profile="ros2", library="rosbag2")
        for name in metadata:
            writer.add_metadata(name, {})
        schema = writer.register_schema("std_msgs/msg/String", "ros2msg", b"string data\n")
        writer.add_message(writer.register_channel("/chatter", "cdr", schema), 1, b"\0\1\0\0\1\0\0\0\0", 1)
        writer.finish()


def _nodes(root: Path) -> None:
    bag(root / "f00.mcap", "episode", "contract")
    bag(root / "f01.mcap", "episode", "contract", "end")


def _foreign(root: Path) -> None:
    bag(root / "bag" / "bag_0.mcap")
    (root / "bag" / "metadata.yaml").write_text("rosbag2_bagfile_information: {}\n")


def _broken(root: Path) -> None:
    (root / "record.mcap").write_text("{}")


def _not_entered(root: Path) -> None:
    (root / "s").mkdir()
    write_episode(root / "s" / "a.mcap", episode(CONTRACT, steps=1), CONTRACT)


def _set(root: Path) -> None:
    (root / "set" / "meta").mkdir(parents=True)
    (root / "set" / "meta" / "info.json").write_text("{}")


def _set_itself(root: Path) -> None:
    (root / "meta").mkdir()
    (root / "meta" / "info.json").write_text("{}")


def _hdf5(root: Path) -> None:
    h5py.File(root / "demo.hdf5", "w").close()


def _deeper(root: Path) -> None:
    store = EpisodeStore(root / "episodes", create=True)
    write_episode(root / "a.mcap", episode(CONTRACT, steps=1), CONTRACT)
    store.copy_in(root / "a.mcap")
    (root / "a.mcap").unlink()


def _plain(root: Path) -> None:
    (root / "notes.txt").write_text("on Tuesday the cup broke")


KINDS = [
    (_nodes, "2 recordings of the ROS nodes' former recorder", "ratchet episodes import"),
    (_foreign, "1 MCAP file of another program", "LeRobot data set"),
    (_broken, "1 file named .mcap that can't be read", "move them away"),
    (_not_entered, "1 finished episode that no index names (1 of robot 'libero')", "verify --recover"),
    (_set, "a LeRobot data set in", "ratchet episodes import"),
    (_hdf5, "1 HDF5 file", "ratchet episodes import"),
    (_deeper, "a store of episodes in", "/episodes"),
    (_plain, "1 other file (notes.txt)", "name the folder of a store"),
]


@pytest.mark.parametrize(("fill", "what", "fix"), KINDS)
def test_what_lies_there_is_told_with_the_command_that_mends_it(tmp_path: Path, fill, what, fix, capsys) -> None:  # type: ignore[no-untyped-def]
    fill(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["episodes", "list", "--store", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "[episode.no_store]" in told
    assert what in told
    assert fix in told
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("verb", VERBS, ids=lambda v: " ".join(v[:3]))
def test_no_verb_passes_recordings_over(verb: list[str], tmp_path: Path, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    store = tmp_path / "store"
    _nodes(store)
    assert main([*verb, str(store)]) == 2
    assert "2 recordings" in capsys.readouterr().err
    assert not (store / INDEX).exists()
    # The same where an index is there and knows of nothing.
    EpisodeStore(store, create=True).index.append([("rule", {"second_reader": 0.0})])
    assert main([*verb, str(store)]) == 2
    assert "[episode.nothing_here]" in capsys.readouterr().err


def _stored(root: Path) -> str:
    """A store with one episode of session "s"; its id."""
    store = EpisodeStore(root, create=True)
    write_episode(root / "a.mcap", episode(CONTRACT, steps=1), CONTRACT)
    card = store.copy_in(root / "a.mcap")
    (root / "a.mcap").unlink()
    return card.id


@pytest.mark.parametrize("verb", VERBS, ids=lambda v: " ".join(v[:3]))
def test_a_folder_inside_a_store_names_the_store_and_gets_no_index(
    verb: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _stored(Path("store"))
    (session,) = (p for p in Path("store").iterdir() if p.is_dir())
    before = sorted(tmp_path.rglob("*"))
    assert main([*verb, str(session)]) == 2
    assert "name that one: store" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("verb", [v for v in VERBS if v[0] != "sync"], ids=lambda v: " ".join(v[:3]))  # it waits
@pytest.mark.parametrize("there", [True, False])
def test_an_empty_folder_is_refused_and_a_store_beside_it_is_named(
    verb: list[str], there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _stored(Path("runs/robot/episodes"))
    if there:
        Path("runs/episodes").mkdir()
    assert main([*verb, "runs/episodes"]) == 2
    assert "such as runs/robot/episodes" in capsys.readouterr().err
    assert Path("runs/episodes").exists() == there
    assert not Path("runs/episodes", INDEX).exists()


def test_a_second_file_of_an_episode_is_called_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = _stored(tmp_path)
    (tmp_path / "copy.mcap").write_bytes(EpisodeStore(tmp_path).path(known).read_bytes())
    for recover in ([], ["--recover"]):
        assert main(["episodes", "verify", "--store", str(tmp_path), "--json", *recover]) == 0
        told = json.loads(capsys.readouterr().out)
        assert [d["code"] for d in told["damages"]] == ["episode.twice"]
        assert known[:12] in told["damages"][0]["what"]
        assert (told["sound"], told["entered"]) == (1, [])


@pytest.mark.parametrize(
    ("fill", "allowed"),
    [
        (_nodes, False),
        (_foreign, False),
        (_set_itself, False),
        (_deeper, False),
        (_hdf5, True),
        (_plain, True),
        (_broken, True),
        (_not_entered, True),
        (lambda root: None, True),
    ],
)
def test_nothing_is_recorded_among_other_recordings(tmp_path: Path, fill, allowed: bool) -> None:  # type: ignore[no-untyped-def]
    fill(tmp_path)
    if allowed:
        require_room(tmp_path)
    else:
        with pytest.raises(RatchetError, match=r"episode\.other_folder.*record into a new folder"):
            require_room(tmp_path)
    EpisodeStore(tmp_path, create=True).index.append([("rule", {"second_reader": 0.0})])
    require_room(tmp_path)  # whatever lies in a store that is one already


def test_no_store_is_made_of_a_file_or_inside_another_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    _stored(tmp_path / "store")
    for place in ("file", "store/s"):
        with pytest.raises(RatchetError, match=r"episode\.other_folder"):
            require_room(tmp_path / place)
    with pytest.raises(RatchetError, match=r"episode\.no_store.*name that one"):
        EpisodeStore(tmp_path / "store" / "s", create=True)


def test_an_index_of_something_else_is_no_store(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text('{"pages": 3}\n')
    (tmp_path / "deep").mkdir()
    require_room(tmp_path / "deep")
    assert look(tmp_path / "deep") == []


def test_a_refused_import_leaves_no_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _hdf5(tmp_path)
    words = ["--contract", "robots/libero.yaml", "--store", str(tmp_path / "new")]
    assert main(["episodes", "import", str(tmp_path / "demo.hdf5"), *words]) == 2
    assert not (tmp_path / "new" / INDEX).exists()


def test_nothing_at_all_is_no_refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = EpisodeStore(tmp_path, create=True)
    assert look(tmp_path) == []
    store.index.append([("rule", {"second_reader": 0.0})])
    assert main(["episodes", "list", "--store", str(tmp_path)]) == 0
    assert "0 episodes" in capsys.readouterr().out


def test_recovery_passes_over_what_it_cannot_mend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(3):
        write_episode(tmp_path / f"{i}.mcap", episode(CONTRACT, steps=1, seed=i), CONTRACT)
    _broken(tmp_path)
    bag(tmp_path / "00.mcap")
    bag(tmp_path / "bag.mcap.open")
    whole = (tmp_path / "2.mcap").read_bytes()
    (tmp_path / "2.mcap").write_bytes(whole[:-1])
    code = main(["episodes", "verify", "--recover", "--store", str(tmp_path), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (code, told["sound"], len(told["entered"])) == (1, 2, 2)
    passed = {Path(row["path"]).name: row["code"] for row in told["passed_over"]}
    assert passed == {
        "00.mcap": "episode.not_an_episode",
        "2.mcap": "episode.damaged",
        "bag.mcap.open": "episode.not_an_episode",
        "record.mcap": "episode.damaged",
    }
    assert (tmp_path / "bag.mcap.open").exists(), "what is not ours is not deleted"
    assert main(["episodes", "verify", "--store", str(tmp_path), "--json"]) == 0
    codes = [d["code"] for d in json.loads(capsys.readouterr().out)["damages"]]
    assert sorted(set(codes)) == ["episode.not_an_episode", "episode.not_entered", "episode.unfinished"]


def test_an_episode_under_way_keeps_nobody_from_waiting_for_it(tmp_path: Path) -> None:
    file = GrowingFile(tmp_path / "a.mcap.open", tmp_path / "a.mcap")
    (found,) = look(tmp_path)
    assert (found.what, found.passes) == ("1 episode being recorded now", True)
    EpisodeStore(tmp_path, create=True).require_some(waits=True)
    file.close()
    assert "cut off" in look(tmp_path)[0].what
