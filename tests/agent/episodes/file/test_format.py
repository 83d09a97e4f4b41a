"""On-policy learning lives on ratios of log-probabilities: an episode that comes back rounded teaches something else.

Pinned: a written episode is read back bit by bit; its id is the hash of the file; other projects' readers see standard
messages; lossy codecs stay near; what would not come back is refused before anything is written; a cut-off file gives
what is whole in it, at any byte. Deterministic: random numbers are seeded, and no clock enters where ids are compared.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from rosbags.rosbag2 import Reader
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from ratchet_vla.episodes.file import format as fmt
from ratchet_vla.episodes.file.reader import EpisodeReader, read_episode
from ratchet_vla.episodes.file.writer import write_episode
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import ActionChunk, Episode, Observation, Step
from tests.agent.episodes.samples import episode, same, small_contract

CONTRACT = small_contract()


@pytest.mark.parametrize("frames", fmt.LOSSLESS)
@pytest.mark.parametrize("ticks", [True, False])
def test_comes_back_bit_by_bit(tmp_path: Path, frames: fmt.Codec, ticks: bool) -> None:
    written = episode(CONTRACT, ticks=ticks)
    digest = write_episode(tmp_path / "a.mcap", written, CONTRACT, frames=frames)
    assert same(read_episode(tmp_path / "a.mcap"), written)
    assert digest == hashlib.sha256((tmp_path / "a.mcap").read_bytes()).hexdigest()
    assert [p.name for p in tmp_path.iterdir()] == ["a.mcap"]


floats = st.floats(width=32, allow_nan=False)
matrix = hnp.arrays(np.float32, (3, 7), elements=floats)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    actions=matrix,
    log_prob=matrix,
    tokens=st.none() | hnp.arrays(np.int64, (3, 7)) | hnp.arrays(np.float32, (5, 4, 8), elements=floats),
    stamp=st.floats(0, 1e6),
    temperature=st.floats(0, 10),
    reward=st.floats(allow_nan=False, allow_infinity=False),
    text=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30),
    executed=hnp.arrays(np.bool_, 3),
)
def test_any_numbers_come_back(tmp_path: Path, text: str, executed: Any, **n: Any) -> None:
    seen = Observation({}, {"gripper": n["actions"][0, :2].copy()}, text, n["stamp"], 2**40)
    has = n["tokens"] is not None
    chosen = ActionChunk(
        n["actions"], n["tokens"], n["log_prob"] if has else None, text, n["temperature"], n["stamp"], 2**40
    )
    written = Episode("t", text, [Step(seen, chosen, executed, n["reward"], True, 2)], meta={"text": text})
    path = tmp_path / "a.mcap"
    path.unlink(missing_ok=True)
    write_episode(path, written, CONTRACT)
    assert same(read_episode(path), written)


def test_same_episode_same_id(tmp_path: Path) -> None:
    ids = {
        write_episode(
            tmp_path / f"{i}.mcap",
            episode(CONTRACT, seed=i // 2),
            CONTRACT,
            created="2026-01-01T00:00:00+00:00",
            clock_offset=1e9,
        )
        for i in range(4)
    }
    assert len(ids) == 2


@pytest.mark.parametrize(("frames", "allowed"), [("jpeg", 3.0), ("h264", 8.0)])
def test_lossy_codecs_stay_near(tmp_path: Path, frames: fmt.Codec, allowed: float) -> None:
    contract = small_contract(64)
    written = episode(contract, smooth=True)
    write_episode(tmp_path / "a.mcap", written, contract, frames=frames)
    read = read_episode(tmp_path / "a.mcap")
    for mine, theirs in zip(written.steps, read.steps, strict=True):
        assert same(mine.chunk, theirs.chunk)
        for camera, image in mine.observation.images.items():
            error = np.abs(image.astype(int) - theirs.observation.images[camera])
            assert error.mean() < allowed, "a wrong order of colours or frames is far above this"


def test_other_readers_see_standard_messages(tmp_path: Path) -> None:
    written = episode(CONTRACT)
    write_episode(tmp_path / "a.mcap", written, CONTRACT, created="2026-01-01T00:00:00+00:00", clock_offset=1.7e9)
    reader = EpisodeReader(tmp_path / "a.mcap")
    topics = [t for cameras in reader.info.topics.values() for t in cameras.values()]
    store = get_typestore(Stores.EMPTY)
    with Reader(tmp_path / "a.mcap") as messages:
        for connection in messages.connections:
            store.register(get_types_from_msg(connection.msgdef.data, connection.msgtype))
        types = {c.topic: c.msgtype for c in messages.connections}
        seen: dict[str, list[Any]] = {}
        for connection, _, raw in messages.messages():
            seen.setdefault(connection.topic, []).append(store.deserialize_cdr(raw, connection.msgtype))
    assert {types[t] for t in topics} == {"sensor_msgs/msg/Image"}
    first = seen["/ratchet/cameras/agentview/image_raw"][0]
    assert (first.height, first.width, first.encoding) == (16, 16, "rgb8")
    assert first.data.tobytes() == written.steps[0].observation.images["agentview"].tobytes()
    assert first.header.stamp.sec == 1_700_000_000
    assert len(seen[fmt.TICK]) == len(written.ticks)
    log_prob = written.steps[1].chunk.log_prob
    assert log_prob is not None
    assert seen[fmt.CHUNK][1].log_prob.tobytes() == log_prob.tobytes()
    sent = [t.command for t in written.ticks if t.command is not None]
    assert [m.data.astype(np.float32).tobytes() for m in seen[fmt.COMMAND]] == [c.tobytes() for c in sent]
    assert seen["/ratchet/state/eef_position"][0].layout.dim[0].label == "eef_position"


def test_the_contract_travels_with_the_episode(tmp_path: Path) -> None:
    write_episode(tmp_path / "a.mcap", episode(CONTRACT), CONTRACT, calibrations={"wrist": "cal-7"}, session="s1")
    info = EpisodeReader(tmp_path / "a.mcap").info
    assert info.robot() == CONTRACT
    assert (info.calibrations, info.session, info.adapter_id) == ({"wrist": "cal-7"}, "s1", "ab" * 32)
    other = dataclasses.replace(info, contract_id="0" * 64)
    with pytest.raises(RatchetError, match=r"episode\.other_contract"):
        other.robot()


def _with_step(**facts: Any) -> Episode:
    made = episode(CONTRACT)
    made.steps[2] = dataclasses.replace(made.steps[2], **facts)
    return made


def _with_chunk(**facts: Any) -> Episode:
    return _with_step(chunk=dataclasses.replace(episode(CONTRACT).steps[2].chunk, **facts))


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (_with_chunk(log_prob=np.zeros((4, 7))), "episode.bad_record"),
        (_with_chunk(tokens=np.zeros((4, 7), np.int32)), "episode.bad_record"),
        (_with_chunk(tokens=np.zeros((4, 7), np.float32)), "episode.bad_record"),
        (_with_chunk(tokens=np.zeros((1, 4, 7), np.float32)), "episode.bad_record"),
        (_with_chunk(tokens=np.zeros((3, 4, 6), np.float32)), "episode.bad_record"),
        (_with_chunk(actions=np.zeros((4, 6), np.float32)), "episode.bad_record"),
        (_with_step(executed=np.ones(3, bool)), "episode.bad_record"),
        (_with_step(steps_run=5), "episode.bad_record"),
        (dataclasses.replace(episode(CONTRACT), meta={"x": float("nan")}), "episode.bad_meta"),
        (dataclasses.replace(episode(CONTRACT), meta={"x": (1, 2)}), "episode.bad_meta"),
    ],
)
def test_what_would_not_come_back_is_refused(tmp_path: Path, bad: Episode, code: str) -> None:
    with pytest.raises(RatchetError) as refused:
        write_episode(tmp_path / "a.mcap", bad, CONTRACT)
    assert refused.value.code == code
    assert list(tmp_path.iterdir()) == []


def test_unknown_cameras_and_sizes_are_refused(tmp_path: Path) -> None:
    made = episode(CONTRACT)
    with pytest.raises(RatchetError, match=r"episode\.bad_record"):
        write_episode(tmp_path / "a.mcap", made, small_contract(32))
    made.steps[0].observation.images["ceiling"] = np.zeros((16, 16, 3), np.uint8)
    with pytest.raises(RatchetError, match=r"contract\.unknown_camera"):
        write_episode(tmp_path / "a.mcap", made, CONTRACT)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    write_episode(tmp_path / "a.mcap", episode(CONTRACT), CONTRACT)
    before = (tmp_path / "a.mcap").read_bytes()
    with pytest.raises(RatchetError, match=r"episode\.exists"):
        write_episode(tmp_path / "a.mcap", episode(CONTRACT, seed=1), CONTRACT)
    assert (tmp_path / "a.mcap").read_bytes() == before


def test_damage_is_told_and_a_cut_file_gives_what_is_whole(tmp_path: Path) -> None:
    written = episode(CONTRACT, steps=3)
    write_episode(tmp_path / "a.mcap", written, CONTRACT)
    data = (tmp_path / "a.mcap").read_bytes()
    record = data.index(fmt.BEGIN_RECORD.encode()) - 4 - 9  # opcode and length come before the name's length
    header = record + 9 + int.from_bytes(data[record + 1 : record + 9], "little")
    cut = tmp_path / "cut.mcap"
    for size in range(0, len(data) - 1, 97):
        cut.write_bytes(data[:size])
        with pytest.raises(RatchetError, match=r"episode\.damaged"):
            read_episode(cut)
        if size < header:
            with pytest.raises(RatchetError, match=r"episode\.damaged"):
                EpisodeReader(cut, cut_off=True)
        else:
            part = EpisodeReader(cut, cut_off=True).episode()
            assert same(part.steps, written.steps[: len(part.steps)])
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    cut.write_bytes(flipped)
    with pytest.raises(RatchetError, match=r"episode\.damaged"):
        read_episode(cut)
