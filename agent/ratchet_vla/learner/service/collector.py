"""Collector, the robot's side in simulation: runs the learner's rollout requests and sends the episodes.

Knows rollout requests, rollouts and the outbox. Knows no simulator (environments are an argument) and never decides
what is learned. A request is a list of exact episodes, under the adapter that it names; one that was cut off is run
again from its first, and what was sent of it is not sent twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.rollouts.collection import ChunkEnv, run_episodes
from ratchet_vla.learner.rollouts.samples import to_episodes
from ratchet_vla.learner.rollouts.specs import Task, training_specs
from ratchet_vla.link.robot.client import LinkClient
from ratchet_vla.link.robot.outbox import Outbox
from ratchet_vla.link.rollout_requests import RolloutRequest
from ratchet_vla.link.session_records import EPISODE
from ratchet_vla.policy.protocol import Policy
from ratchet_vla.records import Episode
from ratchet_vla.storage.disk import disk_errors
from ratchet_vla.storage.files import Files

log = logging.getLogger("ratchet.robot")
LOOK = 1.0  # seconds between looks at wishes that arrive as files


class Abandoned(Exception):
    """The rollout request is not wanted any more, or the robot was stopped."""


class Collector:
    """Call `run`; `stop` from any thread ends it.

    Args:
        serve: given an adapter id, the policy that runs it; this is where hot swaps happen.
        stored: whether an adapter is here already.
        write: writes an episode's file.
        spool: folder for episodes that are being written; on the outbox's file system.
        meta: what to say with each episode, such as session and contract; asked anew for each request.
        paused: whether nothing should be collected now, such as outside a session; asked between episodes.
        pulse: called between requests, between episodes and about once a second where there is nothing to run.
    """

    def __init__(
        self,
        client: LinkClient,
        outbox: Outbox,
        serve: Callable[[str], Policy],
        stored: Callable[[str], bool],
        env: ChunkEnv,
        tasks: Mapping[str, Task],
        write: Callable[[Path, Episode], None],
        spool: Path,
        *,
        meta: Callable[[], dict[str, Any]] = dict,
        paused: Callable[[], bool] = lambda: False,
        pulse: Callable[[], None] = lambda: None,
        files: Files | None = None,
    ) -> None:
        self._client = client
        self._outbox = outbox
        self._serve = serve
        self._stored = stored
        self._env = env
        self._tasks = tasks
        self._write = write
        self._spool = spool
        self._meta = meta
        self._paused = paused
        self.pulse = pulse
        self._files = files or Files()
        self._stopping = False
        self._over: set[str] = set()
        self.doing = "starting"
        self.error = ""
        with disk_errors(spool):
            self._files.folder(spool)
            for path in spool.iterdir():
                self._files.remove(path)  # written by a process that is gone, never accepted by the outbox

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Run rollout requests until `stop` is called or `until` holds between two of them."""
        while not self._stopping and not until():
            self.pulse()
            request = self._next()
            if request is None:
                self._tell("paused" if self._paused() else "waiting for a rollout request")
                self._wait_for_news()
                continue
            try:
                self.work(request)
                self.error = ""
            except Abandoned:
                log.info("rollout request %s abandoned", request.id)
            except RatchetError as error:
                if not error.code.startswith(("link.", "adapter.", "episode.disk_full")):
                    raise
                log.warning("%s", error)
                self.error = str(error)
                self._tell("held up")
                self._client.wait(lambda: self._stopping, LOOK)

    def stop(self) -> None:
        """End `run` at the next episode. Any thread."""
        self._stopping = True
        self._client.nudge()

    def work(self, request: RolloutRequest) -> None:
        """Run one rollout request and put its episodes into the outbox.

        Raises:
            Abandoned: where the learner wants something else meanwhile.
            RatchetError: link.outbox_full, link.disk_full; the request is run again later then.
        """
        task = self._tasks.get(request.task)
        if task is None:
            raise RatchetError(
                "robot.unknown_task", f"no task '{request.task}' here", fix="start with the task's suite"
            )
        specs = training_specs(
            task,
            seed=request.seed,
            stage=request.stage,
            update=request.update,
            groups=request.groups,
            group_size=request.group_size,
            horizon=request.horizon,
        )
        keys = [f"{request.id}/{slot}" for slot in range(len(specs))]
        if all(self._outbox.knows(key) for key in keys):
            self._over.add(request.id)
            return
        policy = self._serve(request.adapter)
        self._tell(f"running {request.task} under {request.adapter[:12]}")

        def progress(done: int, success: bool) -> None:
            self._files.step("phase", self._spool / "rollout")
            self.pulse()
            if self._stopping or self._paused() or not self._wanted(request):
                raise Abandoned

        _, batch = run_episodes(
            policy,
            self._env,
            specs,
            temperature=request.temperature,
            noise_correlation=request.noise_correlation,
            adapter_id=request.adapter,
            progress=progress,
        )
        assert batch is not None
        extra = self._meta()
        for slot, episode in enumerate(to_episodes(batch, specs, policy, self._env.contract)):
            if self._outbox.knows(keys[slot]):
                continue
            episode.meta.update(extra, order=request.id, slot=slot)
            path = self._spool / f"{slot}.mcap"
            with disk_errors(path):
                # A file of this name is left from a put that failed: its content may be half of an episode.
                self._files.remove(path)
                self._write(path, episode)
            meta = {**extra, "order": request.id, "slot": slot, "adapter": request.adapter, "task": request.task}
            self._outbox.put(path, EPISODE, keys[slot], {**meta, "success": bool(episode.success)})
        self._over.add(request.id)
        rate = float(np.mean(batch.success))
        log.info(
            "rollout request %s: %d episodes, success %.0f %%, %.0f s",
            request.id,
            len(specs),
            100 * rate,
            batch.seconds,
        )

    # -- inside --------------------------------------------------------------------------------------------------

    def _next(self) -> RolloutRequest | None:
        """The learner's rollout request, if it is not done and its adapter is here."""
        request = RolloutRequest.of(self._client.state)
        if request is None or request.id in self._over or self._paused():
            return None
        if not self._stored(request.adapter):
            self._client.want([request.adapter])
            return None
        return request

    def _wait_for_news(self) -> None:
        known_version = self._client.status().version
        self._client.wait(lambda: self._stopping or self._news(known_version), LOOK)

    def _news(self, version: str) -> bool:
        return self._client.version != version or self._next() is not None

    def _wanted(self, request: RolloutRequest) -> bool:
        """Whether the request still stands. While the learner is away, the last one does."""
        raw = self._client.state.get("order")
        return raw is None or raw.get("id") == request.id

    def _tell(self, doing: str) -> None:
        self.doing = doing
        status = self._client.status()
        self._client.report(
            {
                "doing": doing,
                "waiting": status.waiting,
                "waiting_bytes": status.waiting_bytes,
                "error": self.error[:300],
            }
        )
