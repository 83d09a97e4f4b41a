"""`ratchet robot`: the robot's side of learning, without ROS, on a simulated robot."""

from __future__ import annotations

import dataclasses
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console

from ratchet_sim import registry
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.cli import common
from ratchet_vla.cli.computing import ComputingOptions
from ratchet_vla.cli.recipes import DEMO
from ratchet_vla.cli.remote import options as remote
from ratchet_vla.cli.remote.robot_link import Link
from ratchet_vla.contract import RobotContract
from ratchet_vla.episodes.file.writer import write_episode
from ratchet_vla.episodes.library.store import EpisodeStore
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.service.collector import Collector
from ratchet_vla.link.session_records import SESSION, session_record
from ratchet_vla.policy.protocol import Policy
from ratchet_vla.records import Episode
from ratchet_vla.runtime.session.controller import SessionController
from ratchet_vla.runtime.session.dispatch import of_session
from ratchet_vla.runtime.session.manifest import Manifest

STATUS_PERIOD_S = 1.0  # between two writings of the status file
DELIVERY_S = 30.0  # how long the last files may take to be delivered, with --until-done


@dataclass
class Robot(remote.LearnerOptions, ComputingOptions):
    """Follow a learner: fetch the adapter that it trains, collect the episodes that it requests, send them.

    Commands to copy:

        ratchet robot --name robot-1 --learner tcp://192.0.2.7:5544 --keys keys/robot-1/robot-1.key_secret

        ratchet robot --learner tcp://127.0.0.1:5544 --plain --out runs/robot --session manual

        ratchet session start --robot runs/robot

    Works on without the learner: episodes wait on the disk, the last adapter runs on. Killed at any moment, the same
    command goes on where it was.
    """

    suite: str = "metaworld"
    """Simulation suite whose robot this is."""
    learner: str = remote.ADDRESS
    """The learner's address."""
    out: Path = remote.FOLDER
    """Folder of the robot: outbox, adapters, sessions. One robot per folder."""
    policy: Path | None = None
    """Folder of the base policy; the built-in one of the suite if absent."""
    lora: common.LoraOptions = field(default_factory=common.LoraOptions)
    recipe: Literal["none", "demo"] = "none"
    """demo: take the adapter's shape of `ratchet demo` instead of --lora."""
    session: Literal["auto", "manual"] = "auto"
    """auto: a session lasts as long as this process. manual: collect only between `ratchet session start|stop`."""
    episodes: Path | None = None
    """Folder of the episode store that keeps everything that was run, besides sending it; <out>/episodes if absent."""
    workers: int = 1
    """Simulator processes."""
    slots: int = 12
    """Episodes at once in each simulator process."""
    threads: int = 1
    """CPU threads for the policy."""
    until_done: bool = False
    """End when all tasks of the learner are over and everything was delivered."""
    verbose: bool = False
    """Log debug messages too."""

    def run(self) -> int:
        common.threads(self.threads)
        remote.log_to_stderr(self.verbose)
        console = Console()
        contract = registry.contract_for(self.suite)
        self.check_keys()
        store = FolderStore(self.out / "adapters", create=True)
        outbox = self.outbox(self.out)
        lora = DEMO[self.suite].lora if self.recipe == "demo" else self.lora
        running = common.open_running(common.policy_folder(self.suite, self.policy), contract, lora, store)
        common.print_contract(console, contract)
        swapper = running.swapper
        episodes = EpisodeStore(self.episodes or self.out / "episodes", create=True)
        episodes.take_stock()

        def end_of(manifest: Manifest) -> None:
            record = session_record(manifest.session, True, dataclasses.asdict(manifest), manifest.episodes)
            outbox.put(record, SESSION, f"session/{manifest.session}", {"session": manifest.session})

        sessions = SessionController(
            self.out,
            "robot",
            contract,
            swapper.base_id,
            lambda: swapper.current_id,
            episodes=lambda session: of_session(episodes, session),
            store=str(episodes.root.resolve()),
            on_end=end_of,
        )
        link = Link(self, self.learner, self.out, outbox, store)
        client = link.client
        env = common.make_vector(running.policy, self.suite, contract, self.workers, self.slots)
        status_written_s = 0.0  # on the monotonic clock

        def serve(adapter: str) -> Policy:
            base = client.state.get("base", swapper.base_id)
            if base != swapper.base_id:
                raise RatchetError(
                    "adapter.wrong_base",
                    f"the learner trains base {base[:12]}, this robot runs {swapper.base_id[:12]}",
                    fix="start both with the same --policy",
                )
            return running.serve(adapter)

        def write(path: Path, episode: Episode) -> None:
            keep(episodes, path, episode, contract, sessions.id)

        def show() -> None:
            link.show(
                doing=collector.doing,
                error=collector.error,
                adapter=swapper.current_id,
                session=sessions.id,
                pid=os.getpid(),
            )

        def pulse() -> None:
            # Called between any two steps of the collector: the status file is written once a second at the most.
            nonlocal status_written_s
            sessions.look()
            if time.monotonic() - status_written_s >= STATUS_PERIOD_S:
                status_written_s = time.monotonic()
                show()

        collector = Collector(
            client,
            outbox,
            serve,
            lambda adapter: adapter in store.ids(),
            env,
            {info.name: info for info in registry.tasks(self.suite)},
            write,
            self.out / "spool",
            meta=lambda: {"session": sessions.id, "contract": contract.id, "robot": self.name},
            paused=lambda: not sessions.id,
            pulse=pulse,
        )
        remote.on_stop(collector.stop)
        if self.session == "auto":
            sessions.start({"by": "ratchet robot"})
        link.start()
        console.print(f"robot {self.name} in {self.out}, learner {self.learner}, outbox {len(outbox)} files")
        console.print(f"episodes in {episodes.root}")
        try:
            collector.run(lambda: self.until_done and client.state.get("phase") == "done" and not len(outbox))
            if self.session == "auto":
                sessions.stop("done")
            if self.until_done:
                client.wait(lambda: not len(outbox), DELIVERY_S)
        finally:
            show()
            link.stop()
            env.close()
            sessions.close()
            outbox.close()
        return 0


def keep(store: EpisodeStore, path: Path, episode: Episode, contract: RobotContract, session: str) -> None:
    """Write a requested episode to `path`, and keep it in the store under its place in the rollout request.

    Called again after a crash, it gives the file that the store has: what is sent and what is kept are one.

    Raises:
        RatchetError: what writing an episode raises.
    """
    name = f"{session}/{episode.meta['order']}/{episode.meta['slot']}"
    if store.named(name) is not None:
        store.link_out(name, path)
        return
    write_episode(path, episode, contract, session=session, name=name)
    store.copy_in(path, link=True)
