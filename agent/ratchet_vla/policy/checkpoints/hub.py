"""Where a checkpoint lies: a folder, or a Hugging Face id that was downloaded before. Nothing is ever downloaded here.

Knows paths and the hub's cache. Knows no file format.
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ratchet_vla.errors import RatchetError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def locate(reference: str | Path) -> Path:
    """The folder behind a path or an id such as `openvla/openvla-7b`.

    Raises:
        RatchetError: policy.no_checkpoint where neither exists; policy.not_downloaded for an id that is not in the
        cache,
            with the command that fetches it.
    """
    folder = Path(reference)
    if folder.is_dir():
        return folder
    name = str(reference)
    if not _ID.fullmatch(name):
        raise RatchetError(
            "policy.no_checkpoint", "no such folder", where=name, fix="give a folder or an id such as owner/name"
        )
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, FileNotFoundError):
        raise RatchetError(
            "policy.not_downloaded",
            "neither a folder nor in the Hugging Face cache",
            where=name,
            fix=f"download it once where there is a network: hf download {name}",
        ) from None
