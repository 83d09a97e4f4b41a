"""`ratchet review`: watch episodes and label them, on a page of this machine or in the terminal."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ratchet_vla.cli.episodes.exchange import STORE, opened
from ratchet_vla.cli.episodes.verbs import play
from ratchet_vla.episodes.library.annotations import Annotations, Viewed
from ratchet_vla.episodes.review.server import LOOPBACK, Filters, check_address, make_app, new_token, waiting_for
from ratchet_vla.errors import RatchetError

KEYS = {"s": "success", "f": "failure", "d": "discard"}


@dataclass
class Review:
    """Open the review page, or label in the terminal.

    Commands to copy:

        ratchet review --store runs/episodes

        ratchet review --store runs/episodes --host 0.0.0.0    # for a phone beside the robot; the address has the token

        ratchet review --store runs/episodes --terminal --annotator Ada
    """

    store: Path = STORE
    """Folder with the episodes."""
    host: str = "127.0.0.1"
    """Address to bind to; others can reach any but the loopback."""
    port: int = 8765
    """Port; 0 takes a free one."""
    token: bool = True
    """Demand a token. Only on the loopback may it be left out."""
    second_reader: float | None = None
    """From now on, this share of the episodes needs two readers who agree."""
    terminal: bool = False
    """Label in the terminal instead."""
    annotator: str = ""
    """Your name, for the terminal."""
    columns: int = 80
    """Width of the image in the terminal."""
    speed: float = 1.0
    """Times real time, in the terminal."""

    def run(self) -> int:
        annotations = opened(self.store)
        if self.second_reader is not None:
            annotations.require_second_reader(self.second_reader)
        return self._terminal(annotations) if self.terminal else self._page(annotations)

    def _page(self, annotations: Annotations) -> int:
        import uvicorn

        token = new_token() if self.token else ""
        check_address(self.host, token)
        listening = self._listen()
        port = listening.getsockname()[1]
        hosts = LOOPBACK if self.host in LOOPBACK else ("*",)
        query = f"?token={token}" if token else ""
        names = [self.host] if self.host in LOOPBACK else [self.host if self.host != "0.0.0.0" else _own_address()]
        console = Console(soft_wrap=True)
        console.print(f"review page: http://{names[0]}:{port}/{query}", highlight=False)
        console.print("stop with Ctrl-C; labels are on the disk as soon as they are given", style="dim")
        config = uvicorn.Config(make_app(annotations, token, hosts), log_level="warning", access_log=False)
        uvicorn.Server(config).run(sockets=[listening])
        return 0

    def _listen(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((self.host, self.port))
            listening.listen()  # whoever opens the address as soon as it is printed is let in
        except OSError as error:
            listening.close()
            raise RatchetError(
                "review.no_address",
                error.strerror or str(error),
                where=f"{self.host}:{self.port}",
                fix="choose another --port, or 0 for a free one",
            ) from error
        return listening

    def _terminal(self, annotations: Annotations) -> int:
        if not self.annotator.strip():
            raise RatchetError("episode.no_annotator", "a label needs its annotator's name", fix="give --annotator")
        annotator = " ".join(self.annotator.split())
        skipped: set[str] = set()
        labelled = 0
        while left := [e for e in waiting_for(annotations, annotator, Filters()) if e not in skipped]:
            episode = left[0]
            card = annotations.store.card(episode)
            proposal = annotations.proposal(card)
            says = f"; {proposal.source} says {'success' if proposal.success else 'failure'}" if proposal else ""
            print(f"\n{card.instruction}  ({card.task}, {card.seconds:.1f} s, ended: {card.reason or '?'}{says})")
            began, share = time.monotonic(), 0.0
            while True:
                if share == 0.0:
                    play(annotations.store, card, self.speed, self.columns, 10.0)
                    share = 1.0
                try:
                    answer = input("s success, f failure, d discard, r replay, n next, q quit; then a note: ").strip()
                except EOFError:
                    answer = "q"
                key, _, note = answer.partition(" ")
                if key == "r":
                    share = 0.0
                elif key in KEYS:
                    viewed = Viewed(share, time.monotonic() - began, card.cameras, "terminal")
                    settles = annotations.status(card.id).state == "disputed"
                    annotations.annotate(card.id, KEYS[key], self.annotator, note=note, viewed=viewed, settles=settles)
                    labelled += 1
                    break
                elif key in ("n", "q"):
                    skipped.add(episode)
                    break
            if key == "q":
                break
        print(f"{labelled} labelled")
        return 0


def _own_address() -> str:
    """The address under which others on the local network find this machine; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()
