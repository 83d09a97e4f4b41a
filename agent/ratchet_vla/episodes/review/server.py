"""The review page's server: episodes to watch and label, for a browser on this machine or a phone beside the robot.

Knows HTTP, tokens and who watches what at the moment. Labelling itself is `annotations`'s. Needs no network: the page's
files lie beside this module.
"""

from __future__ import annotations

import dataclasses
import hmac
import secrets
import threading
import time
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse
from pydantic import BaseModel, Field

from ratchet_vla.episodes.library.annotations import Annotations, LabelStatus, Viewed, latest_of
from ratchet_vla.episodes.library.store import Card
from ratchet_vla.episodes.review.preview_cache import PreviewCache
from ratchet_vla.errors import RatchetError

PAGE = Path(__file__).parent / "page"
COOKIE = "ratchet_token"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
LEASE_S = 120.0  # s for which an episode that somebody watches is not offered to somebody else
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
OPEN_STATES = ("unjudged", "second_reader", "disputed")


class GivenLabel(BaseModel):
    """What the page sends; JSON names as in the index."""

    annotator: str = Field(max_length=80, alias="person")
    value: str = Field(max_length=20, alias="verdict")
    note: str = Field("", max_length=2000)
    share: float = Field(0.0, ge=0.0, le=1.0)
    seconds: float = Field(0.0, ge=0.0)
    settles: bool = False


class Filters(BaseModel):
    """Which episodes; empty fields let everything pass.

    state: of a `LabelStatus`, or "open" for what waits for readers.
    """

    task: str = ""
    adapter: str = ""
    session: str = ""
    state: str = "open"

    def pass_(self, card: Card, status: LabelStatus) -> bool:
        """Whether an episode passes every filter."""
        state_matches = status.state in OPEN_STATES if self.state == "open" else self.state in ("", status.state)
        return (
            state_matches
            and self.task in ("", card.task)
            and (not self.adapter or card.adapter_id.startswith(self.adapter))
            and self.session in ("", card.session)
        )


class ReviewQueue:
    """Who watches which episode right now, so that two readers are not given the same one."""

    def __init__(self) -> None:
        self._leases: dict[str, tuple[str, float]] = {}
        self._lock = threading.Lock()

    def next(self, waiting: list[str], annotator: str, skipped: frozenset[str]) -> str | None:
        """The oldest of these episodes; one that nobody else watches, if there is any."""
        now_s = time.monotonic()
        with self._lock:
            watched_by_others = {
                episode
                for episode, (watcher, until_s) in self._leases.items()
                if watcher != annotator and until_s > now_s
            }
            candidates = [episode for episode in waiting if episode not in skipped]
            unwatched = next((episode for episode in candidates if episode not in watched_by_others), None)
            if unwatched is not None:
                self._leases[unwatched] = (annotator, now_s + LEASE_S)
            return unwatched if unwatched is not None else next(iter(candidates), None)


def waiting_for(annotations: Annotations, annotator: str, filters: Filters) -> list[str]:
    """Episodes that this annotator has not labelled and the filters let pass, oldest first."""
    waiting = []
    for card in annotations.store.cards().values():
        if annotator not in latest_of(annotations.labels(card.id)) and filters.pass_(card, annotations.status(card.id)):
            waiting.append(card.id)
    return waiting


def check_address(host: str, token: str) -> None:
    """Raises RatchetError review.no_token for an address that others reach without a token."""
    if host not in LOOPBACK and not token:
        raise RatchetError(
            "review.no_token", f"{host} can be reached by others", fix="leave the token on, or bind to 127.0.0.1"
        )


def make_app(annotations: Annotations, token: str, hosts: tuple[str, ...] = LOOPBACK) -> FastAPI:
    """The page and its interface. token: demanded of every request, empty for none. hosts: names it answers to."""
    app = FastAPI(title="Ratchet review", docs_url=None, redoc_url=None, openapi_url=None)
    queue = ReviewQueue()
    previews = PreviewCache()

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Response:
        host_name = request.headers.get("host", "").rsplit(":", 1)[0].strip("[]")
        if "*" not in hosts and host_name not in hosts:
            return JSONResponse({"error": {"code": "review.other_host", "what": host_name}}, 421)
        query_token = request.query_params.get("token", "")
        if token and request.url.path == "/" and same(query_token, token):
            response: Response = RedirectResponse("/", 303)  # the token leaves the address bar and the history
            response.set_cookie(COOKIE, token, httponly=True, samesite="strict", max_age=30 * 86400)
            return response
        sent_token = request.cookies.get(COOKIE) or request.headers.get("authorization", "").removeprefix("Bearer ")
        if token and not same(sent_token, token):
            problem = "open the address that `ratchet review` printed"
            return JSONResponse({"error": {"code": "review.no_access", "what": problem}}, 401)
        response = await call_next(request)
        response.headers.update(SECURITY_HEADERS)
        return response

    @app.exception_handler(RatchetError)
    async def refused(request: Request, error: RatchetError) -> JSONResponse:
        return JSONResponse({"error": error.for_json()}, 404 if error.code == "episode.unknown" else 409)

    @app.get("/")
    def index() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    @app.get("/page/{name}")
    def asset(name: str) -> FileResponse:
        if name not in ("app.js", "plot.js", "style.css"):
            raise HTTPException(404)
        return FileResponse(PAGE / name, headers={"Cache-Control": "no-cache"})

    @app.get("/api/summary")
    def summary() -> dict[str, Any]:
        cards = annotations.store.cards()
        statuses = annotations.statuses()
        states: dict[str, int] = {}
        for status in statuses.values():
            states[status.state] = states.get(status.state, 0) + 1
        agreeing, pairs = annotations.agreement()
        return {
            "states": states,
            "tasks": sorted({card.task for card in cards.values()}),
            "adapters": sorted({card.adapter_id[:12] for card in cards.values() if card.adapter_id}),
            "sessions": sorted({card.session for card in cards.values() if card.session}),
            "agreement": {"same": agreeing, "pairs": pairs},
        }

    @app.get("/api/next")
    def next_episode(
        annotator: Annotated[str, Query(alias="person")],
        filters: Annotated[Filters, Depends()],
        skip: Annotated[list[str] | None, Query()] = None,
    ) -> dict[str, Any]:
        waiting = waiting_for(annotations, " ".join(annotator.split()), filters)
        return {"episode": queue.next(waiting, annotator, frozenset(skip or ())), "left": len(waiting)}

    @app.get("/api/episodes/{reference}")
    def show(reference: str, annotator: Annotated[str, Query(alias="person")] = "") -> dict[str, Any]:
        card = annotations.store.card(reference)
        status = annotations.status(card.id)
        proposal = annotations.proposal(card)
        labels = annotations.labels(card.id)
        has_labelled = " ".join(annotator.split()) in latest_of(labels)
        return {
            "card": dataclasses.asdict(card),
            "standing": dataclasses.asdict(status),
            "proposal": dataclasses.asdict(proposal) if proposal else None,
            # A second reader must not know the first one's opinion; once opinions differ, or one is given, all may.
            "labels": [label.as_dict() for label in labels] if has_labelled or status.state == "disputed" else [],
            "readers": status.readers,
            **previews.facts(annotations.store, card),
        }

    @app.get("/api/episodes/{reference}/frames/{camera}")
    def frames(reference: str, camera: str, fps: float = 30.0) -> Response:
        card = annotations.store.card(reference)
        packed = previews.pack(annotations.store, card, camera, min(max(fps, 1.0), 120.0))
        return Response(packed, media_type="application/octet-stream", headers={"Cache-Control": "max-age=3600"})

    @app.post("/api/episodes/{reference}/label")
    def label(reference: str, body: GivenLabel, filters: Annotated[Filters, Depends()]) -> dict[str, Any]:
        card = annotations.store.card(reference)
        viewed = Viewed(body.share, body.seconds, card.cameras, "page")
        stored_label = annotations.annotate(
            card.id, body.value, body.annotator, note=body.note, viewed=viewed, settles=body.settles
        )
        waiting_count = len(waiting_for(annotations, stored_label.annotator, filters))
        return {
            "label": stored_label.as_dict(),
            "standing": dataclasses.asdict(annotations.status(card.id)),
            "left": waiting_count,
        }

    @app.get("/api/disagreements")
    def disagreements() -> list[dict[str, Any]]:
        return [
            {"episode": card.id, "task": card.task, "opinions": opinions}
            for card, opinions in annotations.disagreements()
        ]

    return app


def same(sent_token: str, expected_token: str) -> bool:
    """Compared in a time that does not tell how much is right."""
    return hmac.compare_digest(sent_token.encode(), expected_token.encode())


def new_token() -> str:
    """A fresh token for one run of the page."""
    return secrets.token_urlsafe(24)
