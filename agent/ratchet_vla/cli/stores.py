"""Where verbs find adapters, episodes and calibrations: the usual folders, the option `--store`, how a store is opened.

Knows folders. Knows nothing of what a verb does with a store.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ratchet_vla.episodes.library.annotations import Annotations
from ratchet_vla.episodes.library.store import EpisodeStore

if TYPE_CHECKING:
    from ratchet_vla.adapters.store.folder import FolderStore

ADAPTERS = Path("runs/demo/adapters")
EPISODES = Path("runs/episodes")


@dataclass(kw_only=True)
class AdapterStoreOption:
    """Inherited by the verbs that work on a store of adapters."""

    store: Path = ADAPTERS
    """Folder of the adapter store."""

    def open_adapters(self) -> FolderStore:
        """Open the store.

        Raises:
            RatchetError: adapter.no_store.
        """
        from ratchet_vla.adapters.store.folder import FolderStore  # loads torch, which episodes do without

        return FolderStore(self.store)


@dataclass(kw_only=True)
class EpisodeStoreOption:
    """Inherited by the verbs that work on a store of episodes."""

    store: Path = EPISODES
    """Folder of the episode store."""

    def open_annotations(self) -> Annotations:
        """Open the store with the annotations on its episodes.

        Raises:
            RatchetError: episode.no_store, episode.nothing_here; the message names what lies there instead.
        """
        store = EpisodeStore(self.store)
        store.require_some()
        return Annotations(store)
