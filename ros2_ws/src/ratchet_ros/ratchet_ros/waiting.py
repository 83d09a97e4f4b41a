"""Awaiting work of other threads inside callbacks of a SingleThreadedExecutor.

Knows two kinds of futures. A rclpy future that is set from another thread wakes the executor only if told to.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future as ThreadFuture
from typing import Any, TypeVar

from rclpy.node import Node
from rclpy.task import Future

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
