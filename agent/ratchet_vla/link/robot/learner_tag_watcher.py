"""Watcher of the learner's tags, on the robot: its running adapter follows the learner's `active` tag.

Promotion and rollback reach the arm this way. Knows the learner's state, the robot's store and one function that swaps.
Knows no policy. It swaps only to adapters that are in the store under their own hash, and always to the newest target.
A refused swap is reported and the running adapter stays.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from ratchet_vla.adapters.protocol import BASE
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.errors import RatchetError


class LearnerTagWatcher:
    """Give `on_state` to the client and `on_adapter` to the fetcher; both return at once.

    Args:
        store: the robot's store; its `active` and `previous` tags follow too, so that a robot that starts alone runs
            what it ran last. `candidate` follows as a name only: a person may try it.
        swap: brings an adapter id into force between two chunks, such as `HotSwapper.swap`.
        on_swap: called with the id after each swap; on_error with a refusal.
    """

    def __init__(
        self,
        store: FolderStore,
        swap: Callable[[str], object],
        *,
        on_swap: Callable[[str], None] = lambda adapter: None,
        on_error: Callable[[RatchetError], None] = lambda error: None,
    ) -> None:
        self._store = store
        self._swap = swap
        self._on_swap = on_swap
        self._on_error = on_error
        # Guards _wish, _candidate and _stopping, which the link's thread sets; _done, _tagged and _rejected belong to
        # this one's thread.
        self._changed = threading.Condition()
        self._wish = ""
        self._candidate = self._tagged = ""
        self._done = store.tags().get("active", "")
        self._rejected = ""
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="learner-tag-watcher", daemon=True)
        self._thread.start()

    def on_state(self, state: Mapping[str, Any]) -> None:
        active_id = state.get("tags", {}).get("active", "")
        if active_id in ("", BASE) and state.get("mode") == "robot":
            # Nothing is promoted yet. The adapter that training starts from is empty and acts as the base, but samples
            # count as on-policy only under its id.
            active_id = (state.get("order") or {}).get("adapter", "") or active_id
        candidate_id = state.get("tags", {}).get("candidate", "")
        with self._changed:
            if isinstance(active_id, str) and active_id and active_id != self._wish:
                self._wish = active_id
                self._changed.notify_all()
            if isinstance(candidate_id, str) and candidate_id and candidate_id != self._candidate:
                self._candidate = candidate_id
                self._changed.notify_all()

    def on_adapter(self, adapter: str) -> None:
        with self._changed:
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._ready() or self._tries())
                if self._stopping:
                    return
                target_id = self._wish
                is_ready = self._ready()
                candidate_id = self._candidate if self._tries() else ""
            if candidate_id:
                self._tag(candidate_id)
            if not is_ready:
                continue
            try:
                self._swap(target_id)
                if self._store.tags().get("active") != target_id:
                    self._store.promote(target_id, "the learner's active")
            except RatchetError as error:
                self._rejected = target_id
                self._on_error(error)
                continue
            self._done = target_id
            self._rejected = ""
            self._on_swap(target_id)

    def _tag(self, candidate: str) -> None:
        """Tag the candidate in the robot's store, so that a person can try it; it is never run automatically."""
        try:
            if self._store.tags().get("candidate") != candidate:
                self._store.tag("candidate", candidate, "the learner's candidate")
        except RatchetError as error:
            self._on_error(error)
        self._tagged = candidate

    def _tries(self) -> bool:
        return self._candidate not in ("", self._tagged) and self._candidate in self._store.ids()

    def _ready(self) -> bool:
        return self._wish not in ("", self._done, self._rejected) and self._wish in (BASE, *self._store.ids())
