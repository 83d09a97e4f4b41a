"""Who labelled which episode, when, having viewed what; and which episodes may therefore reach the learner.

Knows labels, readers and disagreement. Labels are entries of the store's chained index: nobody's is ever overwritten,
not even one's own. Rules are at `Annotations.status`.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, cast

from ratchet_vla.episodes.library.labels import HUMAN, LABEL_VALUES, Label, LabelValue, Viewed, body_of
from ratchet_vla.episodes.library.store import Card, EpisodeStore
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Episode

__all__ = ["LABEL_VALUES", "Annotations", "Label", "LabelStatus", "LabelValue", "Proposal", "Viewed"]

State = Literal["unjudged", "second_reader", "disputed", "discarded", "verified"]
SIMULATOR = "simulator"


@dataclass(frozen=True)
class Proposal:
    """A program's opinion, shown to an annotator first; never a label. score: its own confidence, in [0, 1]."""

    episode: str
    success: bool
    source: str
    score: float = 1.0


@dataclass(frozen=True)
class LabelStatus:
    """What holds for an episode now. success: of a verified one, else None. source: as in `records.Episode`."""

    state: State
    success: bool | None = None
    source: str = ""
    readers: int = 0


class Annotations:
    """The labels and proposals on the episodes of one store."""

    def __init__(self, store: EpisodeStore) -> None:
        self.store = store
        self._labels: dict[str, list[Label]] = {}
        self._proposals: dict[str, Proposal] = {}
        self._second_reader = 0.0
        self._entries_read = 0
        self._lock = threading.Lock()

    # -- annotating -------------------------------------------------------------------------------------------------

    def annotate(
        self,
        reference: str,
        value: str,
        annotator: str,
        *,
        note: str = "",
        viewed: Viewed | None = None,
        settles: bool = False,
    ) -> Label:
        """A person's label; stored for good. A later one of the same annotator counts instead, and both are kept.

        viewed: what was watched; nothing, where the caller does not know. settles: ends a dispute among other readers.

        Raises:
            RatchetError: episode.unknown, episode.unknown_label, episode.no_annotator, episode.no_dispute.
        """
        episode = self.store.resolve(reference)
        body = body_of(episode, value, annotator, note=note, viewed=viewed, settles=settles)
        if settles and self.status(episode).state != "disputed":
            raise RatchetError("episode.no_dispute", "nobody disagrees", where=episode[:12], fix="label it plainly")
        entry = self.store.index.append([("label", body)])[0]
        return Label.of(entry.number, entry.time, entry.body)

    def propose(self, proposal: Proposal) -> None:
        """A detector's opinion. Raises RatchetError episode.unknown, episode.bad_source."""
        if not proposal.source.startswith("detector:"):
            raise RatchetError("episode.bad_source", f"{proposal.source!r}", fix='name it "detector:<name>"')
        body = {**dataclasses.asdict(proposal), "episode": self.store.resolve(proposal.episode)}
        self.store.index.append([("proposal", body)])

    def require_second_reader(self, share: float) -> None:
        """From now on, this share of the episodes, chosen by their ids, needs two annotators who agree; in [0, 1]."""
        if not 0 <= share <= 1:
            raise RatchetError("episode.bad_share", f"{share} is no share", fix="give a number from 0 to 1")
        self.store.index.append([("rule", {"second_reader": share})])

    # -- asking -------------------------------------------------------------------------------------------------

    def labels(self, episode: str) -> list[Label]:
        """All labels on an episode, oldest first, those taken back by later ones included."""
        self._read_index()
        return list(self._labels.get(episode, ()))

    def proposal(self, card: Card) -> Proposal | None:
        """What to show a reader first: a detector's newest opinion, else the simulator's, or an import's claim."""
        self._read_index()
        if card.id in self._proposals:
            return self._proposals[card.id]
        is_proposal = card.success is not None and not card.source.startswith(HUMAN)  # a person's word is a label
        return Proposal(card.id, bool(card.success), card.source) if is_proposal else None

    @property
    def second_reader(self) -> float:
        """Share of the episodes that need two annotators who agree, in [0, 1]."""
        self._read_index()
        return self._second_reader

    def readers_needed(self, episode: str) -> int:
        """How many annotators the episode needs; its id decides, so that every process says the same."""
        return 2 if int(episode[:8], 16) / 2**32 < self.second_reader else 1

    def status(self, episode: str) -> LabelStatus:
        """Of each annotator the latest label counts, the simulator's own counts as one more reader's.

        Nobody and no simulator: unjudged. Opinions differ: disputed, until one changes or a settling label is given.
        All annotators say discard: discarded. Fewer of them than needed: second_reader. Else verified; a simulated
        episode needs no annotator, and one who differs from the simulator makes it a dispute.
        """
        card = self.store.card(episode)
        latest = latest_of(self.labels(episode))
        settling = [label for label in latest.values() if label.settles]
        if settling:
            last = max(settling, key=lambda label: label.number)
            return _final(last.value, f"human:{last.annotator}", len(latest))
        opinions: dict[str, str] = {name: label.value for name, label in latest.items()}
        discarded = bool(opinions) and set(opinions.values()) == {"discard"}
        if card.source == SIMULATOR and card.success is not None and not discarded:
            opinions[SIMULATOR + ":"] = "success" if card.success else "failure"
        if not opinions:
            return LabelStatus("unjudged")
        if len(set(opinions.values())) > 1:
            return LabelStatus("disputed", readers=len(latest))
        value = cast(LabelValue, next(iter(opinions.values())))
        if not latest:
            return _final(value, SIMULATOR, 0)
        if len(latest) < self.readers_needed(episode):
            return LabelStatus("second_reader", readers=len(latest))
        return _final(value, "human:" + "+".join(latest), len(latest))

    def statuses(self) -> dict[str, LabelStatus]:
        """Episode id -> its status, oldest first."""
        return {episode: self.status(episode) for episode in self.store.cards()}

    def verified(self, **field_values: str) -> Iterator[tuple[Card, LabelStatus]]:
        """What may reach the learner, oldest first. field_values: fields of `Card` that must match, such as task."""
        for card in self.store.cards().values():
            if all(getattr(card, name) == value for name, value in field_values.items()):
                status = self.status(card.id)
                if status.state == "verified":
                    yield card, status

    def read(self, reference: str, *, images: bool = True) -> Episode:
        """A verified episode with the success that holds and its source.

        Raises:
            RatchetError: episode.not_verified, and what reading raises.
        """
        episode = self.store.resolve(reference)
        status = self.status(episode)
        if status.state != "verified":
            raise RatchetError(
                "episode.not_verified",
                f"it is {status.state}",
                where=episode[:12],
                fix="label it with `ratchet review`",
            )
        episode_read = self.store.read(episode, images=images)
        episode_read.success = status.success
        episode_read.success_source = status.source
        return episode_read

    def disagreements(self) -> list[tuple[Card, dict[str, LabelValue]]]:
        """Episodes on which readers (the simulator among them) differ or differed before a settlement."""
        disagreements = []
        for card in self.store.cards().values():
            opinions = {name: label.value for name, label in latest_of(self.labels(card.id)).items()}
            if card.source == SIMULATOR and card.success is not None and opinions:
                opinions[SIMULATOR] = "success" if card.success else "failure"
            if len(set(opinions.values())) > 1:
                disagreements.append((card, opinions))
        return disagreements

    def agreement(self) -> tuple[int, int]:
        """(pairs of readers who agree, pairs of readers on the same episode), the simulator among them."""
        agreeing = pairs = 0
        for card in self.store.cards().values():
            opinions = [label.value for label in latest_of(self.labels(card.id)).values()]
            if card.source == SIMULATOR and card.success is not None and opinions:
                opinions.append("success" if card.success else "failure")
            for position, opinion in enumerate(opinions):
                for other_opinion in opinions[position + 1 :]:
                    pairs += 1
                    agreeing += opinion == other_opinion
        return agreeing, pairs

    # -- inside -------------------------------------------------------------------------------------------------

    def _read_index(self) -> None:
        with self._lock:
            entries = self.store.index.entries(self._entries_read)
            for entry in entries:
                if entry.kind == "label":
                    label = Label.of(entry.number, entry.time, entry.body)
                    self._labels.setdefault(label.episode, []).append(label)
                elif entry.kind == "proposal":
                    self._proposals[entry.body["episode"]] = Proposal(**entry.body)
                elif entry.kind == "rule":
                    self._second_reader = float(entry.body["second_reader"])
            self._entries_read += len(entries)


def latest_of(labels: list[Label]) -> dict[str, Label]:
    """Annotator -> what counts of theirs, in the order of their first labels."""
    latest: dict[str, Label] = {}
    for label in labels:
        latest[label.annotator] = label
    return latest


def _final(value: LabelValue, source: str, readers: int) -> LabelStatus:
    if value == "discard":
        return LabelStatus("discarded", source=source, readers=readers)
    return LabelStatus("verified", value == "success", source, readers)
