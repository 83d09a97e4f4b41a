"""The review page stands between a wrong label and the learner, and beside a robot on a network: both sides are held.

Pinned: no request without the token, none under a foreign host name; each reader gets what they have not labelled, two
readers at once get different ones; a second reader does not see the first one's opinion; what was watched is stored;
refusals carry their codes; frames and plots are those of the recording; the page needs nothing from elsewhere.
Deterministic: the server is called in this process, without a network.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from fastapi.testclient import TestClient

from ratchet_vla.episodes.file.writer import write_episode
from ratchet_vla.episodes.library.annotations import Annotations, Proposal
from ratchet_vla.episodes.library.store import EpisodeStore
from ratchet_vla.episodes.review.preview_cache import PreviewCache
from ratchet_vla.episodes.review.server import PAGE, check_address, make_app
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Mark
from tests.agent.episodes.samples import episode, small_contract

CONTRACT = small_contract(64)
TOKEN = "s3cret"
Start = Callable[..., tuple[TestClient, Annotations, list[str]]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    def begin(*outcomes: bool | None, token: str = TOKEN) -> tuple[TestClient, Annotations, list[str]]:
        store = EpisodeStore(tmp_path, create=True)
        for i, outcome in enumerate(outcomes):
            path = store.folder("s") / f"{i}.mcap"
            made = episode(CONTRACT, seed=i, steps=3, smooth=True, success=outcome, task=f"task{i % 2}")
            store.add(path, write_episode(path, made, CONTRACT, session=f"s{i // 2}"))
        annotations = Annotations(store)
        client = TestClient(make_app(annotations, token), base_url="http://127.0.0.1:8765", follow_redirects=False)
        client.headers["authorization"] = f"Bearer {TOKEN}"
        return client, annotations, list(store.cards())

    return begin


def test_nothing_without_the_token(start: Start) -> None:
    client, annotations, (one,) = start(None)
    del client.headers["authorization"]
    body = {"person": "eve", "verdict": "success"}
    for path in ("/", "/?token=wrong", "/page/app.js", "/api/summary", f"/api/episodes/{one}/frames/wrist"):
        assert client.get(path).status_code == 401
    assert client.post(f"/api/episodes/{one}/label", json=body).status_code == 401
    assert annotations.labels(one) == []
    entered = client.get(f"/?token={TOKEN}")
    assert (entered.status_code, entered.headers["location"]) == (303, "/")
    cookie = entered.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert client.get("/").status_code == 200, "the cookie is enough from now on"
    assert client.get("/api/summary", headers={"host": "evil.example"}).status_code == 421


def test_addresses_that_others_reach_need_a_token() -> None:
    check_address("127.0.0.1", "")
    check_address("0.0.0.0", "token")
    with pytest.raises(RatchetError, match=r"review\.no_token"):
        check_address("0.0.0.0", "")


def test_the_page_needs_nothing_from_elsewhere(start: Start) -> None:
    client, _, _ = start(None)
    page = client.get("/")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    wanted = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert wanted
    assert all(client.get(path).status_code == 200 for path in wanted)
    for file in PAGE.iterdir():
        assert not re.search(r"https?://|//[a-z]+\.", file.read_text()), file.name
        assert file.name == "index.html" or client.get(f"/page/{file.name}").status_code == 200
    assert client.get("/page/../server.py").status_code == 404


def test_one_after_the_other_until_none_is_left(start: Start) -> None:
    client, annotations, ids = start(None, None, True)
    for expected in ids[:2]:
        told = client.get("/api/next", params={"person": "ada"}).json()
        assert told["episode"] == expected
        body = {"person": "ada", "verdict": "failure", "note": "slipped", "share": 0.75, "seconds": 3.5}
        answer = client.post(f"/api/episodes/{expected}/label", json=body).json()
        assert answer["standing"]["state"] == "verified"
    assert client.get("/api/next", params={"person": "ada"}).json() == {"episode": None, "left": 0}
    (label,) = annotations.labels(ids[0])
    assert (label.annotator, label.note, label.viewed.share, label.viewed.seconds) == ("ada", "slipped", 0.75, 3.5)
    assert (label.viewed.via, label.viewed.cameras) == ("page", ("agentview", "wrist"))
    everything = client.get("/api/next", params={"person": "ada", "state": "verified"}).json()
    assert everything == {"episode": ids[2], "left": 1}, "what the simulator labelled can be watched too"


def test_two_readers_are_given_different_episodes(start: Start) -> None:
    client, _, ids = start(None, None)

    def given(annotator: str) -> str:
        return str(client.get("/api/next", params={"person": annotator}).json()["episode"])

    assert [given("ada"), given("bob"), given("ada"), given("bob")] == [ids[0], ids[1], ids[0], ids[1]]
    assert given("cleo") in ids, "rather the same one than none"
    skipped = client.get("/api/next", params={"person": "ada", "skip": [ids[0]]}).json()["episode"]
    assert skipped == ids[1]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"task": "task1"}, [1, 3]),
        ({"session": "s1"}, [2, 3]),
        ({"adapter": "abab"}, [0, 1, 2, 3]),
        ({"adapter": "cd"}, []),
    ],
)
def test_filters(start: Start, filters: dict[str, str], expected: list[int]) -> None:
    client, _, ids = start(None, None, None, None)
    seen: list[str] = []
    while found := client.get("/api/next", params={"person": "ada", "skip": seen, **filters}).json()["episode"]:
        seen.append(found)
    assert seen == [ids[i] for i in expected]


def test_a_second_reader_is_not_told_the_first_ones_opinion(start: Start) -> None:
    client, annotations, (one,) = start(None)
    annotations.require_second_reader(1.0)
    url = f"/api/episodes/{one}/label"
    first = client.post(url, json={"person": "ada", "verdict": "success"}).json()
    assert first["standing"]["state"] == "second_reader"
    assert client.get("/api/next", params={"person": "ada"}).json()["episode"] is None
    assert client.get("/api/next", params={"person": "bob"}).json()["episode"] == one
    assert client.get(f"/api/episodes/{one}", params={"person": "bob"}).json()["labels"] == []
    client.post(url, json={"person": "bob", "verdict": "failure"})
    disputed = client.get(f"/api/episodes/{one}", params={"person": "cleo"}).json()
    assert disputed["standing"]["state"] == "disputed"
    assert [x["verdict"] for x in disputed["labels"]] == ["success", "failure"]
    assert client.get("/api/disagreements").json()[0]["opinions"] == {"ada": "success", "bob": "failure"}
    settled = client.post(url, json={"person": "cleo", "verdict": "failure", "settles": True}).json()
    assert settled["standing"] | {"readers": 0} == {
        "state": "verified",
        "success": False,
        "source": "human:cleo",
        "readers": 0,
    }
    assert client.get("/api/summary").json()["agreement"] == {"same": 1, "pairs": 3}


def test_refusals_carry_their_codes(start: Start) -> None:
    client, annotations, (one,) = start(None)
    before = annotations.store.index.head
    for path, body, status, code in (
        (one, {"person": "", "verdict": "success"}, 409, "episode.no_annotator"),
        (one, {"person": "ada", "verdict": "maybe"}, 409, "episode.unknown_label"),
        ("feed", {"person": "ada", "verdict": "success"}, 404, "episode.unknown"),
    ):
        answer = client.post(f"/api/episodes/{path}/label", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert client.post(f"/api/episodes/{one}/label", json={"person": "ada"}).status_code == 422
    assert client.get(f"/api/episodes/{one}/frames/ceiling").json()["error"]["code"] == "episode.no_camera"
    assert annotations.store.index.head == before


def test_proposals_come_first(start: Start) -> None:
    client, annotations, (one, two) = start(None, False)
    annotations.propose(Proposal(one, True, "detector:gripper", 0.9))
    assert client.get(f"/api/episodes/{one}").json()["proposal"]["source"] == "detector:gripper"
    assert client.get(f"/api/episodes/{two}").json()["proposal"] == {
        "episode": two,
        "success": False,
        "source": "simulator",
        "score": 1.0,
    }


def unpack(data: bytes) -> list[tuple[float, Any]]:
    found, at = [], 0
    while at < len(data):
        time, length = struct.unpack_from("<dI", data, at)
        image_bgr = cv2.imdecode(np.frombuffer(data, np.uint8, length, at + 12), cv2.IMREAD_COLOR)
        assert image_bgr is not None
        found.append((time, image_bgr[..., ::-1]))
        at += 12 + length
    return found


def test_frames_and_plots_are_the_recordings(start: Start) -> None:
    client, annotations, (one,) = start(None)
    recorded = annotations.store.read(one)
    frames = unpack(client.get(f"/api/episodes/{one}/frames/wrist").content)
    assert [t for t, _ in frames] == pytest.approx([0.0, 0.2, 0.4], abs=1e-6)
    for (_, got), step in zip(frames, recorded.steps, strict=True):
        assert np.abs(got.astype(int) - step.observation.images["wrist"]).mean() < 8
    assert len(unpack(client.get(f"/api/episodes/{one}/frames/wrist?fps=2.5").content)) == 2
    facts = client.get(f"/api/episodes/{one}").json()
    assert len(facts["times"]) == len(recorded.ticks)
    measured = [t.state["eef_position"][1] for t in recorded.ticks]
    assert facts["series"]["eef_position.1"] == pytest.approx(measured, abs=1e-5)
    commands = [None if t.command is None else float(t.command[6]) for t in recorded.ticks]
    assert facts["series"]["command gripper"] == pytest.approx(commands, abs=1e-5)
    human = [t.stamp - recorded.steps[0].observation.stamp for t in recorded.ticks if t.marks & Mark.HUMAN]
    assert [begin for begin, _ in facts["spans"]["HUMAN"]] == pytest.approx(human, abs=2e-3)
    assert facts["events"][0]["code"] == "safety.velocity"


def test_memory_of_frames_is_bounded(start: Start) -> None:
    _, annotations, ids = start(None, None, None)
    previews = PreviewCache(limit=1)
    cards = annotations.store.cards()
    for one in ids:
        previews.pack(annotations.store, cards[one], "wrist", 30.0)
        assert len(previews._packs) == 1
