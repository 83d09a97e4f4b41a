"""sim_robot_node: a LIBERO or Meta-World task behind exactly the arm's topics, with /clock.

Knows one simulated task, physics by the control step, and two ways of time: running by itself at a set speed, or
standing still until the next command (lock-step). Knows no policy.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
from ratchet_msgs import msg, srv
from rosgraph_msgs.msg import Clock as ClockMessage

from ratchet_ros.messages import arm_side, convert, decode, encode, qos
from ratchet_ros.messages.intake import require_topic_mapping
from ratchet_ros.messages.times import to_time
from ratchet_ros.nodes.base import OK, Line, RatchetNode, spin
from ratchet_ros.nodes.params import parameter
from ratchet_ros.nodes.waiting import settled
from ratchet_sim import registry
from ratchet_sim.base import TaskEnv
from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError


@dataclass(frozen=True)
class Parameters:
    contract: str = parameter("", "Path of the robot contract; empty for the suite's own.")
    suite: str = parameter("metaworld", "Suite of the task.")
    task: str = parameter("door-open", "Name of the task in the suite.")
    initial_state: int = parameter(
        -1, "Id of the initial state; -1 for the task's first training state.", low=-1, high=1 << 30
    )
    lock_step: bool = parameter(False, "Wait for a command before each control step.")
    speed: float = parameter(1.0, "Simulated seconds per real second, at the most.", low=0.01, high=100.0)
    frame_every: int = parameter(1, "Control steps from one camera frame to the next.", low=1, high=1000)


class SimRobotNode(RatchetNode):
    """The scene and its clock live in one thread; callbacks only queue commands."""

    Parameters = Parameters

    def __init__(self, **options: Any) -> None:
        super().__init__("sim_robot_node", **options)
        self._things: list[Any] = []
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        self._work: deque[Any] = deque()
        self._running = False
        self._time = 1.0  # simulated seconds; 0 would read as "no stamp"
        self._resets = self._steps = 0
        self._behind = 0.0
        self._env: TaskEnv | None = None

    # -- lifecycle -------------------------------------------------------------------------------------------------

    def setup(self) -> None:
        settings = self.settings
        self.contract = (
            RobotContract.load(settings.contract) if settings.contract else registry.contract_for(settings.suite)
        )
        self._topic_mapping = require_topic_mapping(self.contract)
        info = registry.task(settings.suite, settings.task)
        self._initial = settings.initial_state if settings.initial_state >= 0 else info.train_states[0]
        self._queues: list[deque[Any]] = []
        self._latest: list[Any] = []
        reliable = settings.lock_step
        self._profile = qos.LOCK_STEP if reliable else qos.STATES_RELIABLE
        for number, sink in enumerate(self._topic_mapping.commands):
            if sink.kind not in encode.COMMAND_TYPES:
                raise RatchetError("ros.unsupported_sink", f"no simulated arm takes {sink.kind}", where=sink.topic)
            self._queues.append(deque())
            self._latest.append(None)
            kind = encode.COMMAND_TYPES[sink.kind]
            self._keep(self.create_subscription(kind, sink.topic, self._commanded(number), qos.COMMANDS))
        self._clock_out = self._keep(
            self.create_publisher(ClockMessage, "/clock", qos.LOCK_STEP if reliable else qos.CLOCK_DRIVER)
        )
        self._scene = self._keep(self.create_publisher(msg.SceneStatus, "scene_status", qos.STATUS))
        self._images = {
            c.name: self._keep(
                self.create_publisher(decode.image_type(c), c.topic, qos.LOCK_STEP if reliable else qos.IMAGES)
            )
            for c in self.contract.cameras
        }
        self._states: dict[str, Any] = {}
        self._keep(self.create_service(srv.ResetScene, "~/reset", self._serve_reset))

    def start(self) -> None:
        with self._changed:
            self._running = True
        self._thread = threading.Thread(target=self._run, name="scene", daemon=True)
        self._thread.start()

    def halt(self) -> None:
        with self._changed:
            self._running = False
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(10.0)
            self._thread = None

    def teardown(self) -> None:
        for thing in self._things:
            thing.destroy()
        self._things = []

    def diagnose(self) -> list[Line]:
        values = {"time_s": f"{self._time:.3f}", "steps": self._steps, "behind_s": f"{self._behind:.3f}"}
        return [(OK, "scene", "running", values)]

    # -- callbacks -------------------------------------------------------------------------------------------------

    def _commanded(self, number: int) -> Any:
        def received(message: Any) -> None:
            values = arm_side.command_values(self.contract, self._topic_mapping.commands[number], message)
            with self._changed:
                self._queues[number].append(values)
                self._changed.notify_all()

        return received

    async def _serve_reset(self, request: srv.ResetScene.Request, response: srv.ResetScene.Response) -> Any:
        try:
            if not self.active:
                raise RatchetError("ros.not_active", "the node is not active")
            instruction = await settled(self, self._in_scene(lambda: self._reset(request.task, request.initial_state)))
        except RatchetError as error:
            return convert.refused(response, error)
        response.success, response.instruction = True, instruction
        response.stamp = to_time(self._time)
        return response

    def _in_scene(self, work: Any) -> Any:
        from concurrent.futures import Future

        future: Future[Any] = Future()
        with self._changed:
            self._work.append((work, future))
            self._changed.notify_all()
        return future

    # -- the scene's thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._build(self.settings.task)
        self._reset("", self._initial)
        period = 1.0 / self.contract.control_hz
        due = time.monotonic() + period / self.settings.speed
        while self._wait(due):
            began = time.monotonic()
            self._behind = max(began - due, 0.0)
            due = began + period / self.settings.speed  # a late step makes no period shorter: arms have none that are
            command = self._take()
            if command is None:
                continue
            assert self._env is not None
            self._env.step(command)
            self._steps += 1
            self._time += period
            self._publish(self._steps % self.settings.frame_every == 0)
        if self._env is not None:
            self._env.close()
            self._env = None

    def _wait(self, due: float) -> bool:
        """Until the next step is due; work for the scene is done meanwhile. False where the node was deactivated."""
        with self._changed:
            while self._running:
                if self._work:
                    work, future = self._work.popleft()
                    try:
                        future.set_result(work())
                    except RatchetError as error:
                        future.set_exception(error)
                    continue
                if self.settings.lock_step:
                    if all(self._queues):
                        return True
                    self._changed.wait(1.0)
                else:
                    left = due - time.monotonic()
                    if left <= 0.0:
                        return True
                    self._changed.wait(left)
        return False

    def _take(self) -> Any:
        """The action of this step. A delta that was executed once is not executed again; a gripper goes on."""
        names = [d.name for d in self.contract.action.dims]
        gripper = self.contract.action.gripper
        action = np.zeros(len(names))
        with self._changed:
            for number, (sink, queue) in enumerate(zip(self._topic_mapping.commands, self._queues, strict=True)):
                keeps = gripper is not None and sink.dims == (gripper.dim,)
                if self.settings.lock_step:
                    self._latest[number] = queue.popleft()
                elif queue:
                    self._latest[number] = queue[-1]
                    queue.clear()
                elif not keeps:
                    self._latest[number] = None
                if self._latest[number] is not None:
                    action[[names.index(d) for d in sink.dims]] = self._latest[number]
                elif keeps and gripper is not None:
                    action[names.index(gripper.dim)] = gripper.open
        return action.astype(np.float32)

    def _build(self, task: str) -> None:
        if self._env is not None:
            self._env.close()
        self._env = registry.make_env(self.settings.suite, task, self.contract)

    def _reset(self, task: str, initial_state: int) -> str:
        assert self._env is not None
        if task and task != self._env.info.name:
            registry.task(self.settings.suite, task)
            self._build(task)
        self._env.reset(initial_state)
        self._initial = initial_state
        self._resets, self._steps = self._resets + 1, 0
        self._time += 1.0 / self.contract.control_hz
        for number, queue in enumerate(self._queues):
            queue.clear()
            self._latest[number] = None
        self._publish(True)
        return self._env.info.instruction

    def _publish(self, frames: bool) -> None:
        """State and frames first, /clock last: whoever waits for the time finds the data of that time underway."""
        env, stamp = self._env, to_time(self._time)
        assert env is not None
        for topic, message in arm_side.state_messages(self.contract, env.state(), stamp).items():
            if topic not in self._states:
                self._states[topic] = self._keep(self.create_publisher(type(message), topic, self._profile))
            self._states[topic].publish(message)
        if frames:
            for camera in self.contract.cameras:
                self._images[camera.name].publish(arm_side.image_message(env.render(camera.name), camera, stamp))
        scene = msg.SceneStatus(
            suite=self.settings.suite,
            task=env.info.name,
            instruction=env.info.instruction,
            initial_state=self._initial,
            resets=self._resets,
            step=self._steps,
            success=bool(env.success()),
        )
        scene.header.stamp = stamp
        self._scene.publish(scene)
        self._clock_out.publish(ClockMessage(clock=stamp))

    def _keep(self, thing: Any) -> Any:
        self._things.append(thing)
        return thing


def main() -> int:
    return spin(SimRobotNode)


if __name__ == "__main__":
    raise SystemExit(main())
