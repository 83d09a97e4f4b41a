"""The ROS half of `ratchet ctl`: lifecycle, parameters, RunTask, labels, adapters, stop. JSON in, JSON lines out.

Knows services and one action by name. Started by the verb, in the ROS environment's Python.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import rclpy
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from ratchet_msgs import msg, srv
from ratchet_msgs.action import RunTask
from rcl_interfaces.srv import DescribeParameters, GetParameters, ListParameters, SetParameters
from rclpy.action import ActionClient
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter, parameter_value_to_python
from rclpy.signals import SignalHandlerOptions
from std_srvs.srv import SetBool

from ratchet_ros.messages import dds, qos
from ratchet_vla.errors import RatchetError

TRANSITIONS = {
    "configure": Transition.TRANSITION_CONFIGURE,
    "activate": Transition.TRANSITION_ACTIVATE,
    "deactivate": Transition.TRANSITION_DEACTIVATE,
    "cleanup": Transition.TRANSITION_CLEANUP,
    "shutdown": Transition.TRANSITION_UNCONFIGURED_SHUTDOWN,
}
SHUTDOWN = {
    1: Transition.TRANSITION_UNCONFIGURED_SHUTDOWN,
    2: Transition.TRANSITION_INACTIVE_SHUTDOWN,
    3: Transition.TRANSITION_ACTIVE_SHUTDOWN,
}
DISCOVERY, LONGEST_DISCOVERY = 1.0, 5.0  # s until nodes have found each other: usually, and on a busy machine
SILENCE = 30.0  # s without feedback, which comes several times a second: the node that ran the goal is gone
OUTCOMES = {0: "unjudged", 1: "success", 2: "failure"}


class Control:
    """One client node and bounded waiting. limit: seconds for any single answer."""

    def __init__(self, namespace: str, limit: float) -> None:
        self.node = Node("ratchet_ctl", namespace=namespace or None)
        self.executor = SingleThreadedExecutor()
        self.executor.add_node(self.node)
        self.limit = limit
        self.interrupted = False

    def until(self, ready: Callable[[], bool], what: str, limit: float | None = None) -> None:
        end = time.monotonic() + (limit or self.limit)
        while not ready():
            left = end - time.monotonic()
            if left <= 0.0:
                raise RatchetError(
                    "ctl.no_answer", f"{what} did not answer in {limit or self.limit:.0f} s", fix="is it up?"
                )
            self.executor.spin_once(timeout_sec=min(left, 0.2))

    def call(self, kind: Any, name: str, request: Any, limit: float | None = None) -> Any:
        client = self.node.create_client(kind, name)
        try:
            self.until(client.service_is_ready, name)
            future = client.call_async(request)
            self.until(future.done, name, limit)
            return future.result()
        finally:
            self.node.destroy_client(client)

    def checked(self, answer: Any) -> Any:
        """Raise a service's coded refusal."""
        if not answer.success:
            raise RatchetError(answer.code or "ctl.refused", answer.message)
        return answer

    def latest(self, topics: dict[str, Any], vital: int) -> dict[str, Any]:
        """The latched message of each topic that somebody publishes. topics: name -> message class; the first `vital`
        of them belong to every graph, the others are waited for only as long as discovery usually takes."""
        got: dict[str, Any] = {}

        def keep(topic: str) -> Callable[[Any], None]:
            return lambda message: got.__setitem__(topic, message)

        subscriptions = [self.node.create_subscription(k, n, keep(n), qos.STATUS) for n, k in topics.items()]
        usual, end = time.monotonic() + DISCOVERY, time.monotonic() + min(self.limit, LONGEST_DISCOVERY)
        while len(got) < len(topics) and time.monotonic() < end:
            if time.monotonic() > usual and all(n in got for n in list(topics)[:vital]):
                break
            self.executor.spin_once(timeout_sec=0.1)
        for subscription in subscriptions:
            self.node.destroy_subscription(subscription)
        return got


def lifecycle(control: Control, request: dict[str, Any]) -> Any:
    node, wanted = request["node"], request["transition"]
    state = control.call(GetState, f"{node}/get_state", GetState.Request()).current_state
    if wanted != "get":
        number = SHUTDOWN.get(state.id, 0) if wanted == "shutdown" else TRANSITIONS[wanted]
        change = ChangeState.Request(transition=Transition(id=number))
        if not control.call(ChangeState, f"{node}/change_state", change, 600.0).success:
            fix = "its log and /diagnostics say why"
            raise RatchetError(
                "ctl.transition_refused", f"{wanted} was refused in state {state.label}", where=node, fix=fix
            )
        state = control.call(GetState, f"{node}/get_state", GetState.Request()).current_state
    return {"node": node, "state": state.label}


def wait(control: Control, request: dict[str, Any]) -> Any:
    """Until all of these nodes are active."""
    from lifecycle_msgs.msg import State

    for name in request["nodes"]:

        def active(name: str = name) -> bool:
            state = control.call(GetState, f"{name}/get_state", GetState.Request()).current_state
            return bool(state.id == State.PRIMARY_STATE_ACTIVE)

        control.until(active, f"{name} (to become active)")
    return request["nodes"]


def parameters(control: Control, request: dict[str, Any]) -> Any:
    node, name, value = request["node"], request.get("name"), request.get("value")
    if not name:
        names = list(control.call(ListParameters, f"{node}/list_parameters", ListParameters.Request()).result.names)
    else:
        names = [name]
    if value is not None:
        wanted = Parameter(name, value=_parsed(value)).to_parameter_msg()
        answer = control.call(SetParameters, f"{node}/set_parameters", SetParameters.Request(parameters=[wanted]))
        if not answer.results[0].successful:
            raise RatchetError("ctl.parameter_refused", answer.results[0].reason or "refused", where=f"{node}: {name}")
    values = control.call(GetParameters, f"{node}/get_parameters", GetParameters.Request(names=names)).values
    told = control.call(DescribeParameters, f"{node}/describe_parameters", DescribeParameters.Request(names=names))
    return [
        {"name": n, "value": _plain(parameter_value_to_python(v)), "description": d.description}
        for n, v, d in zip(names, values, told.descriptors, strict=True)
    ]


def run_task(control: Control, request: dict[str, Any]) -> Any:
    """swap_to: an adapter to exchange to as soon as the first feedback shows that the arm moves."""
    client = ActionClient(control.node, RunTask, "policy_node/run_task")
    try:
        control.until(client.server_is_ready, "policy_node/run_task")
        fields = ("task", "instruction", "horizon", "mode", "temperature", "seed", "expected_adapter")
        goal = RunTask.Goal(**{k: request[k] for k in fields if request.get(k)})
        if request.get("temperature") is None:
            goal.temperature = -1.0
        moving: list[Any] = []
        heard = time.monotonic()

        def feedback(message: Any) -> None:
            nonlocal heard
            heard = time.monotonic()
            moving.append(message)
            if request.get("progress"):
                _feedback(message)

        sending = client.send_goal_async(goal, feedback_callback=feedback)
        control.until(sending.done, "run_task")
        handle = sending.result()
        if not handle.accepted:
            raise RatchetError("ctl.refused", "the goal was rejected")
        result, swapped, cancelling = handle.get_result_async(), None, None
        while not result.done():
            control.executor.spin_once(timeout_sec=0.2)
            if time.monotonic() - heard > SILENCE:
                what = f"policy_node has told nothing of the task for {SILENCE:.0f} s"
                raise RatchetError("ctl.no_answer", what, fix="is it up? what it recorded is in the episode store")
            if control.interrupted and cancelling is None:
                cancelling = handle.cancel_goal_async()
            if request.get("swap_to") and moving and swapped is None:
                swapped = swap(control, {"reference": request["swap_to"]})
    finally:
        client.destroy()
    told = result.result().result
    plain = {f: getattr(told, f) for f in told.get_fields_and_field_types()}
    plain["outcome"] = OUTCOMES[told.outcome]
    if swapped is not None:
        plain["swap"] = swapped
    if told.termination == RunTask.Result.END_REFUSED:
        raise RatchetError(told.code, told.message.partition("] ")[2] or told.message)
    return plain


def batch(control: Control, request: dict[str, Any]) -> Any:
    """Several requests by one client; every result is a line of its own as it comes. Ends with their number."""
    for one in request["requests"]:
        print(json.dumps({"result": VERBS[one["verb"]](control, one)}, default=str), flush=True)
        if control.interrupted:
            raise KeyboardInterrupt
    return len(request["requests"])


def swap(control: Control, request: dict[str, Any]) -> Any:
    ask = srv.SwapAdapter.Request(reference=request["reference"], expected_id=request.get("expected_id", ""))
    answer = control.checked(control.call(srv.SwapAdapter, "policy_node/swap_adapter", ask, 600.0))
    return {
        "old_id": answer.old_id,
        "new_id": answer.new_id,
        "ready": answer.ready,
        "unavailable": answer.unavailable,
        "warnings": list(answer.warnings),
    }


def adapters(control: Control, request: dict[str, Any]) -> Any:
    answer = control.checked(control.call(srv.ListAdapters, "policy_node/list_adapters", srv.ListAdapters.Request()))
    return [
        {"id": a.id, "tags": list(a.tags), "task": a.task, "stage": a.stage, "active": a.active}
        for a in answer.adapters
    ]


def label(control: Control, request: dict[str, Any]) -> Any:
    value = {"failure": 0, "success": 1, "discard": 2}[request["verdict"]]
    ask = srv.VerifyEpisode.Request(
        episode=request["episode"], label=value, person=request["person"], note=request["note"]
    )
    control.checked(control.call(srv.VerifyEpisode, "policy_node/verify", ask, 60.0))
    return {"episode": request["episode"] or "the last", "verdict": request["verdict"], "person": request["person"]}


def stop(control: Control, request: dict[str, Any]) -> Any:
    answer = control.call(SetBool, "safety_node/e_stop", SetBool.Request(data=bool(request["pressed"])))
    return {"message": answer.message}


def clear(control: Control, request: dict[str, Any]) -> Any:
    """Both filters of the arm; the command filter alone where somebody else than policy_node commands it."""
    ask = srv.ClearFault.Request(person=request["person"])
    try:
        answer = control.call(srv.ClearFault, "policy_node/clear_fault", ask)
    except RatchetError as error:
        if error.code != "ctl.no_answer":
            raise
        answer = control.call(srv.ClearFault, "safety_node/clear_fault", ask)
    if not answer.success and answer.code != "safety.not_latched":
        raise RatchetError(answer.code, answer.message)
    return {"cleared": answer.cleared if answer.success else "nothing was latched"}


def reset(control: Control, request: dict[str, Any]) -> Any:
    ask = srv.ResetScene.Request(task=request.get("task", ""), initial_state=int(request["initial_state"]))
    answer = control.checked(control.call(srv.ResetScene, "sim_robot_node/reset", ask, 120.0))
    return {"instruction": answer.instruction}


def status(control: Control, request: dict[str, Any]) -> Any:
    names = {"policy_status": "policy", "safety_status": "safety", "scene_status": "scene"}
    kinds = {"policy_status": msg.PolicyStatus, "safety_status": msg.SafetyStatus, "scene_status": msg.SceneStatus}
    out = {
        names[topic]: {f: getattr(got, f) for f in got.get_fields_and_field_types() if f != "header"}
        for topic, got in control.latest(kinds, 2).items()
    }
    if not out:
        raise RatchetError("ctl.nobody", "no node of ours answers", fix="ratchet up sim|real, or check ROS_DOMAIN_ID")
    return out


VERBS: dict[str, Callable[[Control, dict[str, Any]], Any]] = {
    "lifecycle": lifecycle,
    "parameters": parameters,
    "run": run_task,
    "swap": swap,
    "adapters": adapters,
    "judge": label,
    "stop": stop,
    "clear": clear,
    "reset": reset,
    "status": status,
    "batch": batch,
    "await": wait,
}


def _feedback(message: Any) -> None:
    told = message.feedback
    print(
        json.dumps({"feedback": {f: getattr(told, f) for f in told.get_fields_and_field_types()}}, default=str),
        flush=True,
    )


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else list(value) if isinstance(value, tuple) else value


def main() -> int:
    request = json.loads(sys.argv[1])
    dds.load_profile()
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    control = Control(request.get("namespace", ""), float(request.get("limit", 10.0)))

    def interrupt(number: int, frame: object) -> None:
        if request["verb"] not in ("run", "batch") or control.interrupted:
            raise KeyboardInterrupt
        control.interrupted = True  # the first interrupt cancels the task, the second gives up waiting

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        print(json.dumps({"result": VERBS[request["verb"]](control, request)}, default=str), flush=True)
    except RatchetError as error:
        print(json.dumps({"error": error.as_dict()}), flush=True)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        control.node.destroy_node()
        rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
