"""CURVE key files: the identity of a robot or a learner, and the allow list of a learner.

Knows pyzmq's certificate files (`<name>.key` public, `<name>.key_secret` private) and the allow list, a folder of
public keys whose file names are the robots' names. Knows no message and no socket.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import zmq.auth

from ratchet_vla.errors import RatchetError
from ratchet_vla.link.wire import is_name
from ratchet_vla.storage.files import Files

__all__ = ["AllowList", "KeyPair", "allow", "allowed", "load", "load_public", "make", "revoke"]

ALLOWED = "allowed"


@dataclass(frozen=True)
class KeyPair:
    """One side's identity. public, secret: Z85 text, 40 bytes each."""

    name: str
    public: bytes
    secret: bytes

    def __repr__(self) -> str:
        return f"KeyPair({self.name}, public {self.public.decode()})"


def make(folder: Path, name: str) -> KeyPair:
    """Create a key pair in `folder`; the secret file is readable by its owner only.

    Raises:
        RatchetError: link.bad_name; link.key_exists rather than replacing a key that robots rely on.
    """
    _require_name(name)
    public_path = folder / f"{name}.key"
    secret_path = folder / f"{name}.key_secret"
    for key_path in (public_path, secret_path):
        if key_path.exists():
            raise RatchetError(
                "link.key_exists", "a key of this name exists", where=str(key_path), fix="use it, or move it away first"
            )
    files = Files()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        # The secret is never readable by others, not even for the moment before a chmod.
        previous_umask = os.umask(0o077)
        try:
            created_files = zmq.auth.create_certificates(scratch, name)
        finally:
            os.umask(previous_umask)
        for source_file, target_path in zip(created_files, (public_path, secret_path), strict=True):
            with Path(source_file).open("rb") as key_file:
                os.fsync(key_file.fileno())
            files.rename(Path(source_file), target_path)
        public_path.chmod(0o644)
    return load(secret_path)


def load(path: Path) -> KeyPair:
    """Read a secret key file.

    Raises:
        RatchetError: link.no_key, link.bad_key, link.open_key where others could read it.
    """
    public_key, secret_key = _read(path)
    if secret_key is None:
        raise RatchetError("link.bad_key", "this file holds no secret key", where=str(path), fix="name the .key_secret")
    if path.stat().st_mode & 0o077:
        raise RatchetError(
            "link.open_key", "other users can read this secret key", where=str(path), fix=f"chmod 600 {path}"
        )
    return KeyPair(path.name.removesuffix(".key_secret"), public_key, secret_key)


def load_public(path: Path) -> bytes:
    """Read a public key file. Raises RatchetError link.no_key, link.bad_key."""
    return _read(path)[0]


def allow(folder: Path, public_file: Path, name: str = "") -> str:
    """Let a robot in: copy its public key to the allow list under its name; returns the name.

    Raises:
        RatchetError: link.bad_name, link.name_taken where another key has that name.
    """
    name = name or public_file.name.removesuffix(".key")
    _require_name(name)
    public_key = load_public(public_file)
    allowed_path = folder / ALLOWED / f"{name}.key"
    if allowed_path.exists():
        if load_public(allowed_path) == public_key:
            return name
        raise RatchetError(
            "link.name_taken", f"another key is allowed as '{name}'", where=str(allowed_path), fix="revoke it first"
        )
    files = Files()
    files.folder(allowed_path.parent)
    scratch = allowed_path.with_suffix(f".{os.getpid()}")
    scratch.unlink(missing_ok=True)
    files.create(scratch, f'metadata\ncurve\n    public-key = "{public_key.decode()}"\n'.encode())
    files.rename(scratch, allowed_path)
    return name


def revoke(folder: Path, name: str) -> None:
    """Take a robot off the allow list; a running learner stops listening to it at its next message.

    Raises:
        RatchetError: link.not_allowed where it is not on the list.
    """
    allowed_path = folder / ALLOWED / f"{name}.key"
    if not allowed_path.is_file():
        allowed_names = ", ".join(sorted(allowed(folder).values())) or "none"
        raise RatchetError(
            "link.not_allowed", f"'{name}' is not allowed", where=str(folder), fix=f"allowed: {allowed_names}"
        )
    allowed_path.unlink()


def allowed(folder: Path) -> dict[bytes, str]:
    """Public key -> robot's name. A file that cannot be read lets nobody in."""
    names_by_key = {}
    for key_path in sorted((folder / ALLOWED).glob("*.key")):
        try:
            names_by_key[load_public(key_path)] = key_path.name.removesuffix(".key")
        except RatchetError:
            continue
    return names_by_key


class AllowList:
    """The allow list of a running learner, read again whenever the folder changed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stamp: tuple[tuple[str, int], ...] = ()
        self._known: dict[bytes, str] = {}

    def name_of(self, public_key: bytes) -> str | None:
        """The robot behind a public key (Z85), None for a stranger."""
        allow_folder = self._folder / ALLOWED
        folder_stamp: tuple[tuple[str, int], ...] = ()
        if allow_folder.is_dir():
            folder_stamp = tuple(sorted((entry.name, entry.stat().st_mtime_ns) for entry in os.scandir(allow_folder)))
        # Names and times of change: adding or revoking a robot takes effect without a restart.
        if folder_stamp != self._stamp:
            self._known = allowed(self._folder)
            self._stamp = folder_stamp
        return self._known.get(public_key)

    def callback(self, domain: str, public_key: bytes) -> bool:
        """Tell pyzmq's authenticator whether to accept a key; called at each handshake."""
        return self.name_of(public_key) is not None


def _read(path: Path) -> tuple[bytes, bytes | None]:
    if not path.is_file():
        raise RatchetError("link.no_key", "no such key file", where=str(path), fix="make one: ratchet keys make")
    try:
        public_key, secret_key = zmq.auth.load_certificate(path)
    except (OSError, ValueError, UnicodeDecodeError):
        public_key = b""
        secret_key = None
    if len(public_key) != 40 or (secret_key is not None and len(secret_key) != 40):
        raise RatchetError("link.bad_key", "not a CURVE key file", where=str(path), fix="make one: ratchet keys make")
    return public_key, secret_key


def _require_name(name: str) -> None:
    if not is_name(name):
        raise RatchetError(
            "link.bad_name", f"{name!r} cannot be a name", fix="use letters, digits, '.', '_' or '-', at most 64"
        )
