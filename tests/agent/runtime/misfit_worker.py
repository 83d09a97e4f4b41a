"""MisfitWorker: a policy process whose policy commands another robot than the one it is started for."""

from __future__ import annotations

import dataclasses
from typing import Any

from agent.contract import RobotContract
from agent.runtime.chunk_server import ChunkServer
from agent.runtime.policy_worker import serve
from agent.testing.fake_policy_worker import FakePolicy


def open_misfit(options: dict[str, Any], contract: RobotContract) -> ChunkServer:
    policy = FakePolicy(options, contract)
    policy.spec = dataclasses.replace(policy.spec, control_mode="joint_velocity")
    return policy


if __name__ == "__main__":
    raise SystemExit(serve(open_misfit))
