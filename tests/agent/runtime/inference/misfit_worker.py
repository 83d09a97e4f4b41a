"""MisfitWorker: a policy process whose policy commands another robot than the one it is started for."""

from __future__ import annotations

import dataclasses
from typing import Any

from ratchet_vla.contract import RobotContract
from ratchet_vla.runtime.inference.chunk_server import ChunkServer
from ratchet_vla.runtime.inference.worker import serve
from ratchet_vla.testing.fake_policy_worker import FakePolicy


def open_misfit(options: dict[str, Any], contract: RobotContract) -> ChunkServer:
    policy = FakePolicy(options, contract)
    policy.spec = dataclasses.replace(policy.spec, control_mode="joint_velocity")
    return policy


if __name__ == "__main__":
    raise SystemExit(serve(open_misfit))
