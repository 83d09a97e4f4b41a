"""ZeroMQ sockets of the link: CURVE on both sides, or plain on loopback; size limits before anything is read.

Knows socket options and addresses. Knows no message.
"""

from __future__ import annotations

import ipaddress
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator

from ratchet_vla.errors import RatchetError
from ratchet_vla.link.keys import AllowList, KeyPair
from ratchet_vla.link.wire import PAYLOAD_LIMIT

QUEUE = 64  # messages per connection and direction
BACKLOG = 128  # connections that may be in their handshake


def is_loopback(address: str) -> bool:
    """Whether nothing beyond this machine can reach an address such as tcp://127.0.0.1:5555."""
    if not address.startswith("tcp://"):
        return False
    host = address.removeprefix("tcp://").rsplit(":", 1)[0].strip("[]")
    try:
        ip_address = ipaddress.ip_address(host)
        mapped_ipv4 = ip_address.ipv4_mapped if isinstance(ip_address, ipaddress.IPv6Address) else None
        return (mapped_ipv4 or ip_address).is_loopback
    except ValueError:
        return False  # a name, localhost included, may resolve to anything


def require_allowed(address: str, keys: KeyPair | None) -> None:
    """Refuse a transport other than TCP, and unencrypted traffic beyond loopback.

    Raises:
        RatchetError: link.bad_address, link.plain.
    """
    host, _, port_text = address.removeprefix("tcp://").rpartition(":")
    if not address.startswith("tcp://") or not host or not (port_text == "*" or port_text.isdigit()):
        raise RatchetError(
            "link.bad_address", f"{address!r} is not an address", fix="give one such as tcp://192.0.2.7:5544"
        )
    if keys is None and not is_loopback(address):
        raise RatchetError(
            "link.plain",
            "without keys the link is neither encrypted nor authenticated, and only 127.0.0.1 may be used",
            where=address,
            fix="make keys with `ratchet keys make` and name them",
        )


def listen(context: zmq.Context[Any], address: str, keys: KeyPair | None) -> zmq.Socket[Any]:
    """The learner's socket, bound.

    Raises:
        RatchetError: link.bad_address, link.plain, link.address_in_use.
    """
    require_allowed(address, keys)
    router: zmq.Socket[Any] = context.socket(zmq.ROUTER)
    _common(router, address)
    router.setsockopt(zmq.BACKLOG, BACKLOG)
    if keys is not None:
        router.curve_server = True
        router.curve_publickey = keys.public
        router.curve_secretkey = keys.secret
        router.zap_domain = b"ratchet"
    try:
        router.bind(address)
    except zmq.ZMQError as error:
        router.close(0)
        raise RatchetError(
            "link.address_in_use", f"cannot listen: {error}", where=address, fix="choose another port or stop the other"
        ) from None
    return router


def dial(context: zmq.Context[Any], address: str, keys: KeyPair | None, learner: bytes | None) -> zmq.Socket[Any]:
    """The robot's socket; it connects, and connects again after every loss, by itself.

    Args:
        learner: the learner's public key: a robot sends nothing to anybody else.

    Raises:
        RatchetError: link.bad_address, link.plain.
    """
    require_allowed(address, keys)
    dealer: zmq.Socket[Any] = context.socket(zmq.DEALER)
    _common(dealer, address)
    # Nothing is queued for a learner that is not there: what waits, waits on the disk.
    dealer.setsockopt(zmq.IMMEDIATE, 1)
    dealer.setsockopt(zmq.RECONNECT_IVL, 100)
    dealer.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
    dealer.setsockopt(zmq.CONNECT_TIMEOUT, 5000)
    if keys is not None:
        if learner is None:
            raise RatchetError("link.no_key", "the learner's public key is missing", fix="copy its .key file here")
        dealer.curve_serverkey = learner
        dealer.curve_publickey = keys.public
        dealer.curve_secretkey = keys.secret
    dealer.connect(address)
    return dealer


def authenticator(context: zmq.Context[Any], allow: AllowList) -> ThreadAuthenticator:
    """Start the ZAP authenticator of a context: it decides who may connect; `stop` it before the context ends."""
    zap_authenticator = ThreadAuthenticator(context)
    zap_authenticator.start()
    zap_authenticator.configure_curve_callback(domain="ratchet", credentials_provider=allow)
    return zap_authenticator


def receive(socket: zmq.Socket[Any], keep: int) -> list[zmq.Frame]:
    """The next message's frames, at most `keep` + 1 of them kept in memory however many there are."""
    # Frames beyond `keep` are read and dropped: a message of a million frames must not fill the memory.
    frames: list[zmq.Frame] = []
    while True:
        frame = socket.recv(copy=False)
        if len(frames) <= keep:
            frames.append(frame)
        if not frame.more:
            return frames


def _common(socket: zmq.Socket[Any], address: str) -> None:
    # Closing never waits for unsent messages: what matters is on the disk and is sent again.
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, PAYLOAD_LIMIT)
    socket.setsockopt(zmq.SNDHWM, QUEUE)
    socket.setsockopt(zmq.RCVHWM, QUEUE)
    socket.setsockopt(zmq.IPV6, int("[" in address))
    # A peer whose cable was pulled is noticed, and its connection dropped, without waiting for TCP's hours.
    socket.setsockopt(zmq.HEARTBEAT_IVL, 2000)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 10000)
    socket.setsockopt(zmq.HANDSHAKE_IVL, 10000)
