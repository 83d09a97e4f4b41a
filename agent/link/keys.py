"""CURVE keys on disk: who a robot or a learner is, and whom a learner lets in.

Knows pyzmq's certificate files (`<name>.key` public, `<name>.key_secret` private) and the allow list, a folder of
public keys whose file names are the robots' names. Knows no message and no socket.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import zmq.auth

from agent.adapters.files import Files
from agent.errors import RatchetError
from agent.link.wire import is_name

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
    public, secret = folder / f"{name}.key", folder / f"{name}.key_secret"
    for path in (public, secret):
        if path.exists():
            raise RatchetError(
                "link.key_exists", "there is a key of this name", where=str(path), fix="use it, or move it away first"
            )
    files = Files()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        before = os.umask(0o077)
        try:
            made = zmq.auth.create_certificates(scratch, name)
        finally:
            os.umask(before)
        for source, target in zip(made, (public, secret), strict=True):
            with open(source, "rb") as file:
                os.fsync(file.fileno())
            files.rename(Path(source), target)
        public.chmod(0o644)
    return load(secret)


def load(path: Path) -> KeyPair:
    """Read a secret key file.

    Raises:
        RatchetError: link.no_key, link.bad_key, link.open_key where others could read it.
    """
    public, secret = _read(path)
    if secret is None:
        raise RatchetError("link.bad_key", "this file holds no secret key", where=str(path), fix="name the .key_secret")
    if path.stat().st_mode & 0o077:
        raise RatchetError(
            "link.open_key", "other users can read this secret key", where=str(path), fix=f"chmod 600 {path}"
        )
    return KeyPair(path.name.removesuffix(".key_secret"), public, secret)


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
    key = load_public(public_file)
    target = folder / ALLOWED / f"{name}.key"
    if target.exists():
        if load_public(target) == key:
            return name
        raise RatchetError(
            "link.name_taken", f"another key is allowed as '{name}'", where=str(target), fix="revoke it first"
        )
    files = Files()
    files.folder(target.parent)
    scratch = target.with_suffix(f".{os.getpid()}")
    scratch.unlink(missing_ok=True)
    files.create(scratch, f'metadata\ncurve\n    public-key = "{key.decode()}"\n'.encode())
    files.rename(scratch, target)
    return name


def revoke(folder: Path, name: str) -> None:
    """Take a robot off the allow list; a running learner stops listening to it at its next message.

    Raises:
        RatchetError: link.not_allowed where it is not on the list.
    """
    target = folder / ALLOWED / f"{name}.key"
    if not target.is_file():
        known = ", ".join(sorted(allowed(folder).values())) or "none"
        raise RatchetError("link.not_allowed", f"'{name}' is not allowed", where=str(folder), fix=f"allowed: {known}")
    target.unlink()


def allowed(folder: Path) -> dict[bytes, str]:
    """Public key -> robot's name. A file that cannot be read lets nobody in."""
    found = {}
    for path in sorted((folder / ALLOWED).glob("*.key")):
        try:
            found[load_public(path)] = path.name.removesuffix(".key")
        except RatchetError:
            continue
    return found


class AllowList:
    """The allow list of a running learner, read again whenever the folder changed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stamp: tuple[tuple[str, int], ...] = ()
        self._known: dict[bytes, str] = {}

    def name_of(self, public: bytes) -> str | None:
        """The robot behind a public key (Z85), None for a stranger."""
        place = self._folder / ALLOWED
        stamp = tuple(sorted((e.name, e.stat().st_mtime_ns) for e in os.scandir(place))) if place.is_dir() else ()
        if stamp != self._stamp:
            self._known, self._stamp = allowed(self._folder), stamp
        return self._known.get(public)

    def callback(self, domain: str, key: bytes) -> bool:
        """What pyzmq's authenticator asks at a handshake."""
        return self.name_of(key) is not None


def _read(path: Path) -> tuple[bytes, bytes | None]:
    if not path.is_file():
        raise RatchetError("link.no_key", "no such key file", where=str(path), fix="make one: ratchet keys make")
    try:
        public, secret = zmq.auth.load_certificate(path)
    except (OSError, ValueError, UnicodeDecodeError):
        public, secret = b"", None
    if len(public) != 40 or (secret is not None and len(secret) != 40):
        raise RatchetError("link.bad_key", "not a CURVE key file", where=str(path), fix="make one: ratchet keys make")
    return public, secret


def _require_name(name: str) -> None:
    if not is_name(name):
        raise RatchetError(
            "link.bad_name", f"{name!r} cannot be a name", fix="use letters, digits, '.', '_' or '-', at most 64"
        )
