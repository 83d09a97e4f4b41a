"""Awaiting work of other threads inside callbacks of a SingleThreadedExecutor.

Knows two kinds of futures. A rclpy future that is set from another thread wakes the executor only if told to.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future as ThreadFuture
from typing import Any, TypeVar

from rclpy.client import Client
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.task import Future

from ratchet_vla.errors import RatchetError

T = TypeVar("T")


async def settled(node: Node, future: ThreadFuture[T]) -> T:
    """The result of a thread's future, or its exception raised, without holding the executor up."""
    mirror: Future = Future()

    def done(_: ThreadFuture[T]) -> None:
        mirror.set_result(None)
        executor = node.executor
        if executor is not None:
            executor.wake()

    future.add_done_callback(done)
    await mirror
    return future.result()


async def answered(node: Node, client: Client, request: Any, limit: float) -> Any:
    """A service's answer, without holding the executor up. limit: seconds. client: of a reentrant callback group, as
    the callback that awaits this.

    Raises:
        RatchetError: ros.no_answer where nobody serves it, or the answer does not come in time.
    """
    nobody = RatchetError(
        "ros.no_answer", "nobody answers", where=client.srv_name, fix="`ratchet ctl status` says which nodes are up"
    )
    if not client.service_is_ready():
        raise nobody
    over: Future = Future()
    timer = node.create_timer(
        limit, lambda: over.set_result(None), client.callback_group, Clock(clock_type=ClockType.STEADY_TIME)
    )
    asked = client.call_async(request)
    asked.add_done_callback(lambda _: over.set_result(None))
    try:
        await over
    finally:
        node.destroy_timer(timer)
    if not asked.done():
        client.remove_pending_request(asked)
        raise nobody
    return asked.result()


def in_thread(work: Callable[[], T], name: str) -> ThreadFuture[T]:
    """Run `work` in a daemon thread of its own."""
    import threading

    future: ThreadFuture[Any] = ThreadFuture()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
