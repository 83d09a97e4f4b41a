"""The robot's running adapter follows the learner's `active`: promotion and rollback reach the arm by this.

Knows the learner's state, the robot's store and one function that swaps. Knows no policy. It swaps only to what stands
in the store under its own hash, and the newest wish wins. A refused swap is told and the running adapter stays.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from agent.adapters.protocol import BASE
from agent.adapters.store import FolderStore
from agent.errors import RatchetError


class Follower:
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
        self._store, self._swap, self._on_swap, self._on_error = store, swap, on_swap, on_error
        self._changed = threading.Condition()
        self._wish = ""
        self._candidate = self._tagged = ""
        self._done = store.tags().get("active", "")
        self._refused = ""
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="link-follower", daemon=True)
        self._thread.start()

    def on_state(self, state: Mapping[str, Any]) -> None:
        active = state.get("tags", {}).get("active", "")
        if active in ("", BASE) and state.get("mode") == "robot":
            # Nothing is promoted. The adapter that is trained from is empty and acts as the base, but only under its
            # id is what the arm does on-policy.
            active = (state.get("order") or {}).get("adapter", "") or active
        candidate = state.get("tags", {}).get("candidate", "")
        with self._changed:
            if isinstance(active, str) and active and active != self._wish:
                self._wish = active
                self._changed.notify_all()
            if isinstance(candidate, str) and candidate and candidate != self._candidate:
                self._candidate = candidate
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
                wish, ready, candidate = self._wish, self._ready(), self._candidate if self._tries() else ""
            if candidate:
                self._tag(candidate)
            if not ready:
                continue
            try:
                self._swap(wish)
                if self._store.tags().get("active") != wish:
                    self._store.promote(wish, "the learner's active")
            except RatchetError as error:
                self._refused = wish
                self._on_error(error)
                continue
            self._done, self._refused = wish, ""
            self._on_swap(wish)

    def _tag(self, candidate: str) -> None:
        """Give the candidate its name here, so that a person can try it; nothing runs it by itself."""
        try:
            if self._store.tags().get("candidate") != candidate:
                self._store.tag("candidate", candidate, "the learner's candidate")
        except RatchetError as error:
            self._on_error(error)
        self._tagged = candidate

    def _tries(self) -> bool:
        return self._candidate not in ("", self._tagged) and self._candidate in self._store.ids()

    def _ready(self) -> bool:
        return self._wish not in ("", self._done, self._refused) and self._wish in (BASE, *self._store.ids())
