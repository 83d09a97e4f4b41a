"""Records are checked before anything is written: what would not come back as it was is refused.

Knows shapes and dtypes as `ratchet_vla.records` states them. Knows no file.
"""

from __future__ import annotations

import numpy as np

from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import ActionChunk, ControlTick, Float32, Observation, Step


def check_observation(observation: Observation, contract: RobotContract) -> None:
    """Raises RatchetError episode.bad_record, contract.unknown_camera."""
    for name, image in observation.images.items():
        spec = contract.camera(name)
        if image.shape != (spec.height, spec.width, 3) or image.dtype != np.uint8:
            raise _bad(
                f"image is {image.dtype} {image.shape}, the contract says uint8 ({spec.height}, {spec.width}, 3)",
                f"camera {name}, observation {observation.sequence}",
            )
    _check_state(observation.state, contract, f"observation {observation.sequence}")


def check_chunk(chunk: ActionChunk, contract: RobotContract) -> None:
    """Raises RatchetError episode.bad_record."""
    location = f"chunk {chunk.observation_sequence}"
    if chunk.actions.ndim != 2 or chunk.actions.shape[1] != contract.action.size or not len(chunk.actions):
        raise _bad(f"actions have shape {chunk.actions.shape}, the contract has {contract.action.size}", location)
    for name, values, dtype in (
        ("actions", chunk.actions, np.float32),
        ("log_prob", chunk.log_prob, np.float32),
    ):
        if values is not None and (values.dtype != dtype or values.shape != chunk.actions.shape):
            problem = f"{name} are {values.dtype} {values.shape}, records say {np.dtype(dtype)} {chunk.actions.shape}"
            raise _bad(problem, location)
    tokens = chunk.tokens
    if tokens is None:
        return
    steps, dims = chunk.actions.shape
    is_bins = tokens.dtype == np.int64 and tokens.shape == (steps, dims)
    is_chain = tokens.dtype == np.float32 and tokens.ndim == 3 and len(tokens) > 1
    if not is_bins and not (is_chain and tokens.shape[1] >= steps and tokens.shape[2] >= dims):
        problem = (
            f"tokens are {tokens.dtype} {tokens.shape}, records say int64 {(steps, dims)} or float32 (N + 1, H, A)"
        )
        raise _bad(problem, location)


def check_step(step: Step, contract: RobotContract) -> None:
    """Raises RatchetError episode.bad_record, contract.unknown_camera."""
    check_observation(step.observation, contract)
    check_chunk(step.chunk, contract)
    length = len(step.chunk.actions)
    if step.executed.shape != (length,) or step.executed.dtype != np.bool_:
        raise _bad(f"executed is {step.executed.dtype} {step.executed.shape}, not bool ({length},)", "step")
    if not 0 <= step.steps_run <= length:
        raise _bad(f"steps_run is {step.steps_run} of {length}", "step")


def check_tick(tick: ControlTick, contract: RobotContract) -> None:
    """Raises RatchetError episode.bad_record."""
    location = f"tick {tick.index}"
    for name, values in (("sampled", tick.sampled), ("command", tick.command), ("applied", tick.applied)):
        if values is not None and (values.dtype != np.float32 or values.shape != (contract.action.size,)):
            raise _bad(f"{name} is {values.dtype} {values.shape}, not float32 ({contract.action.size},)", location)
    _check_state(tick.state, contract, location)


def _check_state(state: dict[str, Float32], contract: RobotContract, location: str) -> None:
    sizes = {spec.name: spec.size for spec in contract.state}
    for name, values in state.items():
        if name not in sizes:
            raise _bad(f"the contract has no state field {name!r}", location)
        if values.dtype != np.float32 or values.shape != (sizes[name],):
            raise _bad(f"state {name} is {values.dtype} {values.shape}, not float32 ({sizes[name]},)", location)


def _bad(problem: str, location: str) -> RatchetError:
    return RatchetError(
        "episode.bad_record", problem, where=location, fix="nothing was written; see ratchet_vla.records"
    )
