"""Others train on what is exported, and the learner on what is imported: one shifted row teaches the wrong thing.

Pinned: LeRobotDataset v3 as LeRobot writes it (columns, types, metadata, files), every number equal and every frame
near what was recorded, all or nothing; robomimic HDF5 likewise, without loss; imports of both LeRobot versions and of
LIBERO's files give back states, physical actions and upright frames; human segments become samples that span no gap.
Deterministic: seeded episodes; foreign files are written here by the layouts' descriptions.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ratchet_vla.contract import RobotContract
from ratchet_vla.episodes.exchange import lerobot_export as export
from ratchet_vla.episodes.exchange import lerobot_layout
from ratchet_vla.episodes.exchange import lerobot_layout as lerobot
from ratchet_vla.episodes.exchange.hdf5 import export_hdf5
from ratchet_vla.episodes.exchange.imports import NameMapping, demonstration, import_lerobot, import_libero
from ratchet_vla.episodes.exchange.lerobot_export import ExportOptions, export_lerobot
from ratchet_vla.episodes.exchange.rows import best_rate, rows, state_vector
from ratchet_vla.episodes.exchange.samples import human_samples
from ratchet_vla.episodes.exchange.video import VideoFile, read_video
from ratchet_vla.episodes.file.writer import write_episode
from ratchet_vla.episodes.library.annotations import Annotations
from ratchet_vla.episodes.library.store import EpisodeStore
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Episode, Mark
from tests.agent.episodes.samples import episode, random_image, small_contract, state

CONTRACT = small_contract(64)
H264 = ExportOptions(crf=18)


def controlled(seed: int, steps: int = 12, human: tuple[int, int] = (0, 0)) -> Episode:
    """An episode with a frame and a command at every control step; the steps in `human` are a person's."""
    rng = np.random.default_rng(seed)
    images = [
        {c.name: random_image(CONTRACT, c.name, rng, smooth=True) for c in CONTRACT.cameras} for _ in range(steps)
    ]
    states = [state(CONTRACT, rng) for _ in range(steps)]
    actions = rng.uniform(-0.01, 0.01, (steps, 7)).astype(np.float32)
    marks = [human[0] <= i < human[1] for i in range(steps)]
    made = demonstration(CONTRACT, f"task {seed % 2}", f"t{seed % 2}", images, states, actions, {}, human=marks)
    made.success, made.success_source = True, "simulator"
    return made


def store_of(root: Path, episodes: list[Episode]) -> Annotations:
    store = EpisodeStore(root, create=True)
    for i, made in enumerate(episodes):
        path = store.folder("s") / f"{i}.mcap"
        write_episode(path, made, CONTRACT)
        store.add(path)
    return Annotations(store)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Annotations, Path, Any]:
    root = tmp_path_factory.mktemp("export")
    annotations = store_of(root / "store", [controlled(i, 8 + i) for i in range(3)])
    return annotations, root / "set", export_lerobot(annotations, root / "set", options=H264)


def test_lerobot_files_and_facts(exported: tuple[Annotations, Path, Any]) -> None:
    _, folder, report = exported
    assert (report.episodes, report.frames, report.rate, report.fps) == (3, 27, "control", 20)
    assert report.values_checked == 27 * (8 + 7)
    assert report.worst_error < 8
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert files == [
        "data/chunk-000/file-000.parquet",
        "meta/episodes/chunk-000/file-000.parquet",
        "meta/info.json",
        "meta/ratchet.json",
        "meta/stats.json",
        "meta/tasks.parquet",
        "videos/observation.images.agentview/chunk-000/file-000.mp4",
        "videos/observation.images.wrist/chunk-000/file-000.mp4",
    ]
    info = json.loads((folder / "meta/info.json").read_text())
    assert (info["codebase_version"], info["fps"], info["total_frames"], info["total_tasks"]) == ("v3.0", 20, 27, 2)
    assert info["features"]["observation.images.wrist"]["shape"] == [64, 64, 3]
    assert info["features"]["action"]["names"] == [d.name for d in CONTRACT.action.dims]


def test_lerobot_types_are_those_that_it_writes(exported: tuple[Annotations, Path, Any]) -> None:
    schema = pq.read_schema(exported[1] / "data/chunk-000/file-000.parquet")
    assert str(schema.field("action").type) == "fixed_size_list<element: float>[7]"
    assert schema.field("timestamp").type == pa.float32()
    assert [schema.field(n).type for n in ("frame_index", "episode_index", "index", "task_index")] == [pa.int64()] * 4
    described = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert described["action"] == {"feature": {"dtype": "float32", "_type": "Value"}, "length": 7, "_type": "List"}
    tasks = pq.read_table(exported[1] / "meta/tasks.parquet")
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["task"]
    assert tasks.to_pylist() == [{"task_index": 0, "task": "task 0"}, {"task_index": 1, "task": "task 1"}]
    episodes = pq.read_table(exported[1] / "meta/episodes/chunk-000/file-000.parquet")
    assert str(episodes.schema.field("stats/action/mean").type).startswith("list<element: double>")
    assert str(episodes.schema.field("tasks").type).startswith("list<element: string")
    rows = episodes.to_pylist()
    assert [(r["dataset_from_index"], r["dataset_to_index"], r["length"]) for r in rows] == [
        (0, 8, 8),
        (8, 17, 9),
        (17, 27, 10),
    ]
    key = "videos/observation.images.wrist"
    assert [r[f"{key}/from_timestamp"] for r in rows] == [0.0, 8 / 20, 17 / 20]
    assert np.shape(rows[0]["stats/observation.images.wrist/mean"]) == (3, 1, 1)


def test_lerobot_holds_what_was_recorded(exported: tuple[Annotations, Path, Any]) -> None:
    annotations, folder, _ = exported
    table = pq.read_table(folder / "data/chunk-000/file-000.parquet").to_pydict()
    video = list(read_video(folder / "videos/observation.images.wrist/chunk-000/file-000.mp4"))
    at = 0
    for number, card in enumerate(annotations.store.cards().values()):
        for i, row in enumerate(rows(annotations.store.open(card.id), "control", True)):
            assert np.array(table["action"][at], np.float32).tobytes() == row.action.tobytes()
            assert (
                np.array(table["observation.state"][at], np.float32).tobytes()
                == state_vector(row.state, CONTRACT).tobytes()
            )
            assert (table["episode_index"][at], table["frame_index"][at], table["index"][at]) == (number, i, at)
            assert table["timestamp"][at] == pytest.approx(i / 20)
            last = i == card.ticks - 1
            assert (table["next.done"][at], table["next.success"][at], table["next.reward"][at]) == (last, last, last)
            assert np.abs(video[at].astype(int) - row.images["wrist"]).mean() < 8
            at += 1
    stats = json.loads((folder / "meta/stats.json").read_text())
    actions = np.array(table["action"], np.float64)
    assert stats["action"]["mean"] == pytest.approx(actions.mean(0))
    assert stats["action"]["std"] == pytest.approx(actions.std(0))
    assert stats["action"]["min"] == pytest.approx(actions.min(0))
    assert stats["action"]["count"] == [27]


def test_decisions_alone_are_exported_at_their_own_rate(tmp_path: Path) -> None:
    annotations = store_of(tmp_path / "store", [episode(CONTRACT, steps=4, ticks=False, smooth=True)])
    card = next(iter(annotations.store.cards().values()))
    assert best_rate(annotations.store.open(card.id)) == "decisions"
    report = export_lerobot(annotations, tmp_path / "set", options=H264)
    assert (report.rate, report.fps, report.frames) == ("decisions", 5, 4)
    table = pq.read_table(tmp_path / "set/data/chunk-000/file-000.parquet").to_pydict()
    recorded = annotations.store.read(card.id)
    for i, step in enumerate(recorded.steps):
        assert np.array(table[lerobot.CHUNK][i], np.float32).tobytes() == step.chunk.actions.tobytes()
    sparse = store_of(tmp_path / "sparse", [episode(CONTRACT, steps=2)])  # its ticks outrun its frames
    reader = sparse.store.open(next(iter(sparse.store.cards())))
    assert best_rate(reader) == "decisions"
    with pytest.raises(RatchetError, match=r"episode\.no_frames"):
        list(rows(reader, "control"))


def test_only_verified_episodes_leave(tmp_path: Path) -> None:
    unlabelled = dataclasses.replace(controlled(0), success=None, success_source="")
    annotations = store_of(tmp_path / "store", [unlabelled, controlled(1)])
    first, second = annotations.store.cards()
    assert export_hdf5(annotations, tmp_path / "a.hdf5").episodes == 1
    with pytest.raises(RatchetError, match=r"export\.not_verified"):
        export_hdf5(annotations, tmp_path / "b.hdf5", [first])
    assert export_hdf5(annotations, tmp_path / "c.hdf5", unverified=True).episodes == 2
    annotations.annotate(second, "discard", "ada")
    with pytest.raises(RatchetError, match=r"export\.nothing"):
        export_hdf5(annotations, tmp_path / "d.hdf5")
    assert not (tmp_path / "d.hdf5").exists()


@pytest.mark.parametrize("fault", ["writing", "comparing", "renaming"])
def test_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    annotations = store_of(tmp_path / "store", [controlled(0)])

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    place: tuple[Any, str] = {
        "writing": (lerobot_layout, "write_episodes"),
        "comparing": (export, "compare"),
        "renaming": (export, "_sync_tree"),
    }[fault]
    with monkeypatch.context() as patch:
        patch.setattr(*place, fail)
        with pytest.raises(RatchetError, match=r"episode\.disk_full"):
            export_lerobot(annotations, tmp_path / "set", options=H264)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store"]
    export_lerobot(annotations, tmp_path / "set", options=H264)
    with pytest.raises(RatchetError, match=r"export\.exists"):
        export_lerobot(annotations, tmp_path / "set", options=H264)


def test_a_bad_codec_is_noticed_when_reading_back(tmp_path: Path) -> None:
    annotations = store_of(tmp_path / "store", [controlled(0)])
    with pytest.raises(RatchetError, match=r"export\.differs.*of 255 off"):
        export_lerobot(annotations, tmp_path / "set", options=dataclasses.replace(H264, crf=51, tolerance=0.5))
    with pytest.raises(RatchetError, match=r"export\.bad_frame_size"):
        VideoFile(tmp_path / "x.mp4", 32, 32, 20, "av1", 30)


def test_hdf5_is_equal_to_the_pixel(tmp_path: Path) -> None:
    annotations = store_of(tmp_path / "store", [controlled(0), controlled(1)])
    report = export_hdf5(annotations, tmp_path / "a.hdf5")
    assert report.frames == 24
    with h5py.File(tmp_path / "a.hdf5") as file:
        assert file["data"].attrs["total"] == 24
        for i, card in enumerate(annotations.store.cards().values()):
            demo = file[f"data/demo_{i}"]
            assert demo.attrs["num_samples"] == 12
            for j, row in enumerate(rows(annotations.store.open(card.id), "control", True)):
                assert np.array_equal(demo["obs/agentview_image"][j], row.images["agentview"])
                assert np.array_equal(demo["actions"][j], row.action)


# -- imports -----------------------------------------------------------------------------------------------------


def test_what_was_exported_comes_back(exported: tuple[Annotations, Path, Any], tmp_path: Path) -> None:
    annotations, folder, _ = exported
    store = EpisodeStore(tmp_path, create=True)
    cards = import_lerobot(folder, store, CONTRACT)
    assert [(c.ticks, c.mode, c.human_share, c.success) for c in cards] == [
        (n, "import", 0.0, None) for n in (8, 9, 10)
    ]
    for mine, theirs in zip(annotations.store.cards(), cards, strict=True):
        for a, b in zip(annotations.store.read(mine).ticks, store.read(theirs.id).ticks, strict=True):
            assert a.command is not None
            assert b.command is not None
            assert a.command.tobytes() == b.command.tobytes()
            assert all(a.state[n].tobytes() == b.state[n].tobytes() for n in a.state)
    assert import_lerobot(folder, store, CONTRACT) == cards
    assert len(store.cards()) == 3, "importing again adds nothing"


def old_lerobot(folder: Path, names: list[str] | None) -> np.ndarray:
    """A data set of version 2.1 with frames inside the tables, two episodes of three steps."""
    (folder / "meta").mkdir(parents=True)
    features: dict[str, Any] = {
        "front": {"dtype": "image", "shape": [64, 64, 3], "names": None},
        "observation.state": {"dtype": "float32", "shape": [8], "names": names and [str(i) for i in range(8)]},
        "action": {"dtype": "float32", "shape": [7], "names": {"motors": names} if names else None},
    }
    for key in ("observation.images.one", "observation.images.two"):
        features[key] = features["front"]
    info = {
        "codebase_version": "v2.1",
        "fps": 20,
        "chunks_size": 1000,
        "features": features,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": None,
    }
    (folder / "meta/info.json").write_text(json.dumps(info))
    lines = [json.dumps({"episode_index": e, "tasks": [f"do {e}"], "length": 3}) for e in range(2)]
    (folder / "meta/episodes.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "data/chunk-000").mkdir(parents=True)
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (2, 3, 7)).astype(np.float32)
    for e in range(2):
        image = np.full((64, 64, 3), (250, 10, 10 * e), np.uint8)
        png = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()
        cells = [{"bytes": png, "path": None}] * 3
        columns = {
            "observation.images.one": cells,
            "observation.images.two": cells,
            "observation.state": rng.normal(size=(3, 8)).astype(np.float32).tolist(),
            "action": actions[e].tolist(),
            "frame_index": [2, 0, 1],
            "episode_index": [e] * 3,
            "index": [0, 1, 2],
        }
        pq.write_table(pa.table(columns), folder / f"data/chunk-000/episode_{e:06d}.parquet")
    return actions


def test_version_two_with_other_names_and_commands(tmp_path: Path) -> None:
    actions = old_lerobot(tmp_path / "old", ["a", "b", "c", "d", "e", "f", "g"])
    store = EpisodeStore(tmp_path / "store", create=True)
    with pytest.raises(RatchetError, match=r"import\.other_actions"):
        import_lerobot(tmp_path / "old", store, CONTRACT)
    mapping = NameMapping({"agentview": "one", "wrist": "two"}, actions="command", same_order=True)
    cards = import_lerobot(tmp_path / "old", store, CONTRACT, mapping)
    assert [c.instruction for c in cards] == ["do 0", "do 1"]
    read = store.read(cards[1].id)
    scale = np.array([d.command_scale for d in CONTRACT.action.dims], np.float32)
    sent = np.stack([t.command for t in read.ticks if t.command is not None])
    assert np.array_equal(sent, (actions[1] * scale)[[1, 2, 0]]), "in the order of frames, in physical units"
    assert read.steps[0].observation.images["wrist"][0, 0].tolist() == [250, 10, 10]


def _no_camera(info: dict[str, Any]) -> None:
    del info["features"]["observation.images.one"]


def _other_rate(info: dict[str, Any]) -> None:
    info["fps"] = 30


def _other_state(info: dict[str, Any]) -> None:
    info["features"]["observation.state"]["shape"] = [9]


def _other_version(info: dict[str, Any]) -> None:
    info["codebase_version"] = "v1.6"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (_no_camera, "import.other_camera"),
        (_other_rate, "import.other_rate"),
        (_other_state, "import.other_state"),
        (_other_version, "import.not_lerobot"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], None], code: str) -> None:
    old_lerobot(tmp_path / "old", None)
    path = tmp_path / "old/meta/info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))
    store = EpisodeStore(tmp_path / "store", create=True)
    with pytest.raises(RatchetError) as refused:
        import_lerobot(
            tmp_path / "old", store, CONTRACT, NameMapping({"agentview": "one", "wrist": "two"}, same_order=True)
        )
    assert refused.value.code == code
    assert list(store.root.iterdir()) == []


def libero_file(path: Path, contract: RobotContract) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    data: dict[str, Any] = {
        "actions": rng.uniform(-1, 1, (5, 7)),
        "ee_pos": rng.normal(size=(5, 3)),
        "ee_ori": rng.normal(size=(5, 3)),
        "gripper_states": rng.normal(size=(5, 2)),
        "agentview_rgb": rng.integers(0, 256, (5, 64, 64, 3), np.uint8),
        "eye_in_hand_rgb": rng.integers(0, 256, (5, 64, 64, 3), np.uint8),
    }
    with h5py.File(path, "w") as file:
        file.create_group("data").attrs["problem_info"] = json.dumps({"language_instruction": "put the\nbowl away"})
        for name in ("demo_0", "demo_10", "demo_2"):
            demo = file["data"].create_group(name)
            demo["actions"], demo["dones"] = data["actions"], np.array([0, 0, 0, 0, 1])
            for key in list(data)[1:]:
                demo[f"obs/{key}"] = data[key]
    return data


def test_libero_demonstrations(tmp_path: Path) -> None:
    data = libero_file(tmp_path / "BOWL_demo.hdf5", CONTRACT)
    store = EpisodeStore(tmp_path / "store", create=True)
    cards = import_libero(tmp_path / "BOWL_demo.hdf5", store, CONTRACT)
    assert [c.meta["demonstration"] for c in cards] == ["demo_0", "demo_2", "demo_10"]
    read = store.read(cards[0].id)
    assert (read.task, read.instruction, read.success) == ("BOWL", "put the bowl away", None)
    for i, step in enumerate(read.steps):
        turned = data["agentview_rgb"][i][::-1, ::-1]
        assert np.array_equal(step.observation.images["agentview"], turned), "upright: turned by 180 degrees"
        assert np.array_equal(step.observation.state["gripper"], data["gripper_states"][i].astype(np.float32))
        assert not step.executed.any(), "a person's action never enters the policy gradient"
        scaled = data["actions"][i].astype(np.float32) * np.array([0.05] * 3 + [0.5] * 3 + [1.0], np.float32)
        assert np.array_equal(step.chunk.actions[0], scaled)
    with pytest.raises(RatchetError, match=r"import\.not_hdf5"):
        import_libero(Path(__file__), store, CONTRACT)
    with pytest.raises(RatchetError, match=r"import\.other_size"):
        import_libero(tmp_path / "BOWL_demo.hdf5", store, small_contract(32))


# -- human segments ----------------------------------------------------------------------------------------------


def test_samples_of_human_segments_span_no_gap(tmp_path: Path) -> None:
    broken = controlled(1, 12, human=(0, 12))
    broken.ticks[5] = dataclasses.replace(broken.ticks[5], command=None, marks=Mark.HELD)
    failed = dataclasses.replace(controlled(2, 12, human=(0, 12)), success=False)
    annotations = store_of(tmp_path / "store", [controlled(0, 12, human=(3, 9)), broken, failed, controlled(4, 12)])
    samples = human_samples(annotations, ["wrist"], ["gripper", "eef_position"], 4)
    assert len(samples) == 3 + 2 + 3, "6 in a row, then 5 and 6 around a hold"
    assert (samples.images.shape, samples.state.shape, samples.actions.shape) == ((8, 1, 64, 64, 3), (8, 5), (8, 4, 7))
    first = annotations.store.read(next(iter(annotations.store.cards())))
    assert (
        samples.actions[0].tobytes()
        == np.stack([t.command for t in first.ticks[3:7] if t.command is not None]).tobytes()
    )
    assert np.array_equal(samples.images[0, 0], first.steps[3].observation.images["wrist"])
    assert (
        samples.state[0].tobytes()
        == np.concatenate([first.ticks[3].state[n] for n in ("gripper", "eef_position")]).tobytes()
    )
    assert (samples.tasks, samples.instructions) == (["t0", "t1"], ["task 0", "task 1"])
    assert sorted(set(samples.start.tolist())) == [0, 1]
    with pytest.raises(RatchetError, match=r"warmstart\.nothing"):
        human_samples(annotations, ["wrist"], [], 8)
