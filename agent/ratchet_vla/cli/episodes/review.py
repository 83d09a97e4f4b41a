"""`ratchet review`: watch episodes and label them, on a page of this machine or in the terminal."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass

from rich.console import Console

from ratchet_vla.cli.episodes.verbs import play
from ratchet_vla.cli.stores import EpisodeStoreOption
from ratchet_vla.episodes.library.annotations import Annotations, Viewed
from ratchet_vla.episodes.library.store import Card
from ratchet_vla.episodes.review.server import LOOPBACK, Filters, check_address, make_app, new_token, waiting_for
from ratchet_vla.errors import RatchetError

LABELS = {"s": "success", "f": "failure", "d": "discard"}
REPLAY = "r"
NEXT = "n"
QUIT = "q"
PLAYED_FPS = 10.0  # frames shown per second of recorded time


@dataclass
class Review(EpisodeStoreOption):
    """Open the review page, or label in the terminal.

    Commands to copy:

        ratchet review --store runs/episodes

        ratchet review --store runs/episodes --host 0.0.0.0    # for a phone beside the robot; the address has the token

        ratchet review --store runs/episodes --terminal --annotator Ada
    """

    host: str = "127.0.0.1"
    """Address to listen on. Any but the loopback lets other machines in."""
    port: int = 8765
    """TCP port; 0 takes a free one."""
    token: bool = True
    """Demand a token in the page's address. Only on the loopback may it be left out."""
    second_reader: float | None = None
    """From now on, this share (0 to 1) of the episodes needs two readers who agree; unchanged if absent."""
    terminal: bool = False
    """Label in the terminal instead of on a page."""
    annotator: str = ""
    """Your name, which the terminal needs; the page asks for it."""
    columns: int = 80
    """Width of the images in the terminal, in characters."""
    speed: float = 1.0
    """Factor on real time in the terminal; 2 plays twice as fast."""

    def run(self) -> int:
        annotations = self.open_annotations()
        if self.second_reader is not None:
            annotations.require_second_reader(self.second_reader)
        return self._terminal(annotations) if self.terminal else self._page(annotations)

    def _page(self, annotations: Annotations) -> int:
        import uvicorn

        token = new_token() if self.token else ""
        check_address(self.host, token)
        listener = self._listen()
        port = listener.getsockname()[1]
        # Under other names the page is not served on the loopback: a web page elsewhere could point its own name here.
        hosts = LOOPBACK if self.host in LOOPBACK else ("*",)
        query = f"?token={token}" if token else ""
        console = Console(soft_wrap=True)
        console.print(f"review page: http://{self._reachable_host()}:{port}/{query}", highlight=False)
        console.print("stop with Ctrl-C; labels are on the disk as soon as they are given", style="dim")
        config = uvicorn.Config(make_app(annotations, token, hosts), log_level="warning", access_log=False)
        uvicorn.Server(config).run(sockets=[listener])
        return 0

    def _reachable_host(self) -> str:
        """The host for the page's address; 0.0.0.0 is all of this machine's, of which one is printed."""
        return _own_address() if self.host == "0.0.0.0" else self.host

    def _listen(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((self.host, self.port))
            listener.listen()  # whoever opens the address as soon as it is printed is let in
        except OSError as error:
            listener.close()
            raise RatchetError(
                "review.no_address",
                error.strerror or str(error),
                where=f"{self.host}:{self.port}",
                fix="choose another --port, or 0 for a free one",
            ) from error
        return listener

    def _terminal(self, annotations: Annotations) -> int:
        """Ask for a label of one episode after the other; returns the exit status."""
        if not self.annotator.strip():
            raise RatchetError("episode.no_annotator", "a label needs its annotator's name", fix="give --annotator")
        annotator = " ".join(self.annotator.split())
        passed: set[str] = set()
        labelled = 0
        while True:
            waiting = [episode for episode in waiting_for(annotations, annotator, Filters()) if episode not in passed]
            if not waiting:
                break
            key = self._ask(annotations, waiting[0])
            if key == QUIT:
                break
            if key == NEXT:
                passed.add(waiting[0])
            else:
                labelled += 1
        print(f"{labelled} labelled")
        return 0

    def _ask(self, annotations: Annotations, episode: str) -> str:
        """Play one episode and keep the label that is typed; returns the key of what was chosen."""
        card = annotations.store.card(episode)
        print(_headline(annotations, card))
        started_s = time.monotonic()
        play(annotations.store, card, self.speed, self.columns, PLAYED_FPS)
        while True:
            key, note = _read_key()
            if key == REPLAY:
                play(annotations.store, card, self.speed, self.columns, PLAYED_FPS)
            elif key in LABELS:
                viewed = Viewed(1.0, time.monotonic() - started_s, card.cameras, "terminal")
                settles = annotations.status(card.id).state == "disputed"
                annotations.annotate(card.id, LABELS[key], self.annotator, note=note, viewed=viewed, settles=settles)
                return key
            elif key in (NEXT, QUIT):
                return key


def _headline(annotations: Annotations, card: Card) -> str:
    proposal = annotations.proposal(card)
    proposed = ""
    if proposal:
        proposed = f"; {proposal.source} says {'success' if proposal.success else 'failure'}"
    return f"\n{card.instruction}  ({card.task}, {card.seconds:.1f} s, ended: {card.reason or '?'}{proposed})"


def _read_key() -> tuple[str, str]:
    """The key that was typed, and the note behind it; the end of the input quits."""
    try:
        answer = input("s success, f failure, d discard, r replay, n next, q quit; then a note: ").strip()
    except EOFError:
        return QUIT, ""
    key, _, note = answer.partition(" ")
    return key, note


def _own_address() -> str:
    """The address under which others on the local network find this machine; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # no packet: it only chooses the interface
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()
