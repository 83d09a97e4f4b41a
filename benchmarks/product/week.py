"""The printed week as a person has it: verbs as processes, the review page over HTTP, somebody beside the arm.

For `benchmarks/product/spine.py` and the test of docs/story.md. Knows processes, the lines that they say and how to
kill them; whoever uses it waits for what is said, never for time to pass. Imports no ROS: who stands beside the arm is
a process.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from ratchet_vla.cli.main import main as ratchet
from ratchet_vla.cli.nodes import ros
from ratchet_vla.learner.service.state import LearnerState
from ratchet_vla.paths import python_path
from ratchet_vla.storage.journal import read

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 120.0  # s for anything that is waited for
# What runs at the arm -> words of its command line.
AT_THE_ARM = {
    "sync": "ratchet_vla.cli.main sync",
    "policy": "ratchet_vla.runtime.inference.worker",
    "recorder": "ratchet_vla.episodes.recorder.process",
    "policy_node": "ratchet_ros policy_node",
    "safety_node": "ratchet_ros safety_node",
    "sim_robot_node": "ratchet_ros sim_robot_node",
}


def printed(page: Path, section: str) -> list[str]:
    """The commands in the code blocks of one section of a page, in their order."""
    text = page.read_text().split(f"\n## {section}\n", 1)[1].split("\n## ", 1)[0]
    blocks = re.findall(r"^ *```\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip().startswith("ratchet ")]


def eventually(condition: Callable[[], Any], what: str, limit: float = LIMIT) -> Any:
    """Look again and again at something that tells nobody when it changes, such as a file; its value."""
    end = time.monotonic() + limit
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"not within {limit:.0f} s: {what}")
        time.sleep(0.02)
    return value


class Lines:
    """A process and the lines that it says, read by a thread of its own."""

    def __init__(self, command: list[str], folder: Path, environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("RATCHET_WEEK_ERRORS") else subprocess.STDOUT,
            text=True,
        )
        self.said: list[str] = []
        self._changed = threading.Condition()
        self._read = 0  # lines that `until` has passed over
        self._over = False
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.said.append(line)
                self.heard(line)
                self._changed.notify_all()
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def heard(self, line: str) -> None:
        """For those who understand it; under the lock."""

    def until(self, words: str, limit: float = LIMIT) -> str:
        """The next line with these words; those before it are passed over."""

        def found() -> str | None:
            while self._read < len(self.said):
                self._read += 1
                if words in self.said[self._read - 1]:
                    return self.said[self._read - 1]
            return None

        return str(self.wait_for(found, f"'{words}'", limit))

    def wait_for(self, condition: Callable[[], Any], what: str, limit: float = LIMIT) -> Any:
        """Until something holds of what was said; its value."""
        value: Any = None
        end = time.monotonic() + limit
        with self._changed:
            while not (value := condition()):
                left = end - time.monotonic()
                if self._over or left <= 0.0:
                    why = "it ended" if self._over else f"{limit:.0f} s passed"
                    raise TimeoutError(f"{why} without {what}:\n{''.join(self.said[-40:])}")
                self._changed.wait(left)
        return value

    def kill(self) -> None:
        """As the kernel does when memory is short."""
        self.process.kill()
        self.process.wait()

    def end(self) -> int:
        """As a person does; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(60.0)
        except subprocess.TimeoutExpired:
            self.kill()
            return -signal.SIGKILL


class Verb(Lines):
    """`ratchet …` in a process of its own, in a person's folder."""

    def __init__(self, command: str, folder: Path, extra: Mapping[str, str] | None = None) -> None:
        """command: as printed. extra: environment variables."""
        python = ROOT / ".venv" / "bin" / "python"  # that of the person, also where a test runs in ROS's
        environment = {k: v for k, v in os.environ.items() if k not in ros.SCRUBBED}
        environment |= {
            "PYTHONPATH": python_path(inherited=False),
            "COLUMNS": "200",
            "PYTHONUNBUFFERED": "1",
            **(extra or {}),
        }
        arguments = shlex.split(command)[1:]
        super().__init__([str(python), "-m", "ratchet_vla.cli.main", *arguments], folder, environment)

    def children(self) -> dict[str, psutil.Process]:
        """What runs at the arm, of what this process started."""
        found: dict[str, psutil.Process] = {}
        try:
            every = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return {}
        for process in every:
            try:
                line = " ".join(process.cmdline())
            except psutil.Error:
                continue
            found |= {name: process for name, words in AT_THE_ARM.items() if words in line}
        return found

    def kill_child(self, name: str) -> None:
        child = self.children()[name]
        child.kill()
        eventually(lambda: _dead(child), f"the end of {name}")

    def kill_all(self) -> None:
        """Everything at the arm at once, as when the power goes."""
        children = list(self.children().values())
        self.process.kill()
        for child in children:
            child.kill()
        self.process.wait()
        for child in children:
            eventually(lambda child=child: _dead(child), "the end of everything at the arm")  # type: ignore[misc]


class Beside(Lines):
    """Somebody beside the arm: asks for goals and sees what the arm's status says."""

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self.status: dict[str, Any] = {}
        self.statuses = 0
        self.status_at = 0.0
        self._answers: list[dict[str, Any]] = []
        self._asked = 0
        ready = ros.environment({"PYTHONUNBUFFERED": "1", **(environment or {})})
        super().__init__([ros.python(), "-m", "benchmarks.runtime.ros.beside"], folder, ready)

    def heard(self, line: str) -> None:
        if not line.startswith("{"):
            return
        told = json.loads(line)
        if "status" in told:
            self.status, self.status_at = told["status"], told["at"]
            self.statuses += 1
        else:
            self._answers.append(told)

    def ask(self, verb: str, **request: Any) -> int:
        """Ask for something; the number under which `answer` gives it."""
        assert self.process.stdin is not None
        request = {"task": "", "progress": False, "instruction": "", **request} if verb == "run" else request
        self.process.stdin.write(json.dumps({"verb": verb, **request}) + "\n")
        self.process.stdin.flush()
        self._asked += 1
        return self._asked - 1

    def answer(self, number: int, limit: float = LIMIT) -> dict[str, Any]:
        """What was answered: `{"result": …}`, or `{"error": …}` for a refusal."""
        return dict(self.wait_for(lambda: self._answers[number : number + 1], f"answer {number}", limit)[0])

    def do(self, verb: str, limit: float = LIMIT, **request: Any) -> dict[str, Any]:
        """Ask and wait for the answer."""
        return self.answer(self.ask(verb, **request), limit)

    def cancel(self) -> None:
        """The goal that runs."""
        self.process.send_signal(signal.SIGINT)

    def see(self, condition: Callable[[dict[str, Any]], Any], what: str, limit: float = LIMIT) -> dict[str, Any]:
        """The arm's status once it is so."""
        self.wait_for(lambda: self.status and condition(self.status), f"{what}: {self.status}", limit)
        return self.status


class Page:
    """The review page's interface, as its script uses it."""

    def __init__(self, verb: Verb, annotator: str) -> None:
        """verb: `ratchet review`, whose printed address is followed."""
        address = verb.until("http://").split()[-1]
        self._root, _, self._token = address.partition("/?token=")
        self.annotator = annotator

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"authorization": f"Bearer {self._token}", "content-type": "application/json"}
        request = urllib.request.Request(self._root + path, data, headers)
        with urllib.request.urlopen(request, timeout=60.0) as answer:
            return json.loads(answer.read())

    def next(self, skip: list[str] | None = None) -> dict[str, Any] | None:
        """The card of the oldest episode that waits for this annotator; None where none does."""
        query = "".join(f"&skip={one}" for one in skip or [])
        found = self._ask(f"/api/next?person={self.annotator}{query}")["episode"]
        return None if found is None else dict(self._ask(f"/api/episodes/{found}?person={self.annotator}")["card"])

    def label(self, episode: str, value: str) -> None:
        body = {"person": self.annotator, "verdict": value, "share": 1.0, "seconds": 1.0}
        self._ask(f"/api/episodes/{episode}/label", body)


def _dead(process: psutil.Process) -> bool:
    """Whether it runs no more; its parent may not have asked yet how it ended."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Week:
    """The commands of docs/story.md, and who is at work by them. used: commands that were taken from the page."""

    def __init__(self, folder: Path) -> None:
        """folder: the person's, in which this process must be, too."""
        self.folder = folder
        (folder / "models").symlink_to(ROOT / "models")
        self.commands = printed(ROOT / "docs" / "story.md", "A week at an arm")
        self.used: set[str] = set()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.learner: Verb | None = None
        self.up: Verb | None = None
        self.review: Verb | None = None
        self.beside = Beside(ROOT)

    def printed(self, beginning: str) -> str:
        """The one command that begins so, at ports of this week's own and with little space on the disk."""
        [command] = [c for c in self.commands if f"{c} ".startswith(f"{beginning} ")]
        self.used.add(command)
        own = {
            "ratchet learner": f" --address tcp://127.0.0.1:{self.port} --reserve-gib 0",
            "ratchet up": " --reserve-gib 0",
            "ratchet review": " --port 0",
        }
        return command.replace(":5544", f":{self.port}") + own.get(beginning, "")

    def start(self, beginning: str, **environment: str) -> Verb:
        """A command that goes on until somebody ends it. environment: variables of it."""
        return Verb(self.printed(beginning), self.folder, environment)

    def say(self, beginning: str, *more: str) -> tuple[int, str]:
        """A command, run to its end; its exit status and output. more: options."""
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            code = ratchet([*shlex.split(self.printed(beginning))[1:], *more])
        return code, out.getvalue()

    def make_keys(self) -> None:
        for name in ("make learner", "make robot-1", "allow"):
            code, out = self.say(f"ratchet keys {name}")
            assert code == 0, out

    def open_page(self) -> None:
        self.review = self.start("ratchet review")
        self.page = Page(self.review, "Ada")

    def learner_state(self) -> LearnerState:
        """The learner's state, folded from its journal."""
        journal = self.folder / "runs" / "learner" / "journal.jsonl"
        return LearnerState.of(read(journal)) if journal.is_file() else LearnerState()

    def in_force(self, adapter: str) -> None:
        """Wait until the arm runs it, and whoever collects knows that the learner wants it."""
        status_file = self.folder / "runs" / "robot" / "learner.json"

        def requested() -> bool:
            request = json.loads(status_file.read_text())["order"] if status_file.is_file() else None
            return request is not None and request["adapter"] == adapter

        self.beside.see(lambda s: (s["adapter_id"], s["state"]) == (adapter, "ready"), f"{adapter[:12]} at the arm")
        eventually(requested, f"a rollout request for {adapter[:12]}")

    def end(self) -> None:
        """Leave nothing behind, whatever happened before."""
        stop(self.up, self.learner, self.review, self.beside)


def stop(*processes: Lines | None) -> None:
    """Kill what still runs of these, and what they started."""
    for process in processes:
        if process is None or process.process.poll() is not None:
            continue
        if isinstance(process, Verb):
            process.kill_all()
        else:
            process.kill()


__all__ = ["AT_THE_ARM", "LIMIT", "ROOT", "Beside", "Lines", "Page", "Verb", "Week", "eventually", "printed", "stop"]
