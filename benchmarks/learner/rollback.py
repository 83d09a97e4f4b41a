"""From the learner's word to the arm: how long a promotion or a rollback takes until a running policy acts by it.

A real policy in its own process answers one observation after the other and follows the tag `active` of the robot's
store. In turns, `active` is moved forward and back as the link does it when the learner's message has arrived (looked
up, written durably, renamed); measured until the policy process says that the other adapter is in force.

    python -m benchmarks.learner.rollback [--quick]

Exit 1 where the median is not below one control period of the contract.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.harness.results import machine
from ratchet_sim import registry
from ratchet_vla.adapters.identity import Adapter, binding_of
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.cli import common
from ratchet_vla.link.robot.learner_tag_watcher import LearnerTagWatcher
from ratchet_vla.records import Observation
from ratchet_vla.runtime.inference.client import PolicyClient, PolicyLaunch

ROOT = Path(__file__).resolve().parents[2]


def two_adapters(folder: Path, store: FolderStore) -> list[str]:
    """Two adapters of the built-in policy that change it a little; their ids."""
    contract = registry.contract_for("metaworld")
    policy, lora = common.open_policy(folder, contract, common.LoraOptions(rank=8, alpha=8.0))
    names = []
    for seed in (1, 2):
        draw = np.random.default_rng(seed)
        tensors = {
            n: t + t.new_tensor(draw.normal(0, 1e-3, tuple(t.shape)).astype(np.float32))
            for n, t in lora.export().items()
        }
        names.append(store.put(Adapter(tensors, lora.config, binding_of(policy))).id)
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    moves = 20 if arguments.quick else 200
    contract = registry.contract_for("metaworld")
    period = 1.0 / contract.control_hz
    seconds: list[float] = []
    with tempfile.TemporaryDirectory(prefix="ratchet-rollback-") as scratch:
        store = FolderStore(Path(scratch) / "adapters", create=True)
        policy_folder = common.policy_folder("metaworld", None)
        names = two_adapters(policy_folder, store)
        options = {"policy": str(policy_folder), "store": str(store.root), "follow": "active", "threads": 1}
        with PolicyClient(contract, PolicyLaunch(options=options)) as client:
            assert client.spec is not None
            images = {c: np.zeros((contract.camera(c).height, contract.camera(c).width, 3), np.uint8)
                      for c in client.spec.cameras}  # fmt: skip
            state = {f.name: np.zeros(f.size, np.float32) for f in contract.state}
            stop, answered = threading.Event(), 0

            def drive() -> None:
                nonlocal answered
                while not stop.is_set():
                    client.request(Observation(images, state, "press the button", 0.0, answered))
                    answered += len(client.wait(5.0))

            tag_watcher = LearnerTagWatcher(store, store.resolve)
            arm = threading.Thread(target=drive)
            arm.start()
            try:
                for number in range(moves + 2):  # the first move of each kind loads its adapter from the disk
                    wanted = names[number % 2]
                    began = time.perf_counter()
                    tag_watcher.on_state({"tags": {"active": wanted}})
                    with client._changed:
                        assert client._changed.wait_for(lambda w=wanted: client.adapter_id == w, 30.0)  # type: ignore[misc]
                    if number >= 2:
                        seconds.append(time.perf_counter() - began)
            finally:
                stop.set()
                arm.join()
                tag_watcher.stop()
    middle, late = median(seconds), float(np.quantile(seconds, 0.95))
    report = {
        "command": " ".join(["python -m benchmarks.learner.rollback", *sys.argv[1:]]),
        "machine": machine(),
        "moves": moves,
        "chunks_answered_meanwhile": answered,
        "control_period": period,
        "median": middle,
        "p95": late,
        "spread": [min(seconds), max(seconds)],
        "within_one_period": sum(s < period for s in seconds) / len(seconds),
    }
    if not arguments.quick:
        (ROOT / "benchmarks" / "results" / "rollback.json").write_text(json.dumps(report, indent=1) + "\n")
    print(
        f"rollback: in force {1e3 * middle:.0f} ms after the message (goal < {1e3 * period:.0f} ms, a control period), "
        f"95 % within {1e3 * late:.0f} ms, longest {1e3 * max(seconds):.0f} ms; {answered} chunks answered meanwhile"
    )
    return 0 if middle < period else 1


if __name__ == "__main__":
    raise SystemExit(main())
