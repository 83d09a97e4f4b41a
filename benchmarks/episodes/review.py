"""The review page in a real browser: 100 episodes labelled by keyboard, and what it costs a reader beyond watching.

A headless Chromium opens the page with its token, watches every episode to its end at twice the speed and presses
a key; timed is the time from the key to the next episode's first frame. At the same time three other readers label the
same episodes through the page's interface: in the end everybody's labels must be there. Screenshots are taken of a desk
and of a phone.

    python -m benchmarks.episodes.review [--quick] [--screenshots docs]

Needs `chromium` (Debian) in PATH or --browser. Exit 1 where the goal is missed: median below 1 s, no label lost.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.episodes.recorded import TASKS, fill, rollout, two_cameras
from benchmarks.harness.results import machine
from ratchet_vla.episodes.library.annotations import Annotations
from ratchet_vla.episodes.library.store import EpisodeStore
from ratchet_vla.paths import python_path

GOAL = 1.0  # s, median beyond playback
ROOT = Path(__file__).resolve().parents[2]
SPEED = "2"
# Whether the episode that is shown has been played to its end.
PLAYED = "document.body.dataset.played === document.body.dataset.episode && document.body.dataset.episode || ''"
# Presses nothing itself: `moved` becomes the milliseconds from the last key to the next episode's first painted frame.
NEXT = """(() => { const before = document.body.dataset.episode; let began = 0; window.moved = null;
  addEventListener('keydown', () => { began = performance.now(); }, {capture: true, once: true});
  const look = () => { const empty = !document.getElementById('empty').hidden;
    if (document.body.dataset.episode !== before || empty) { watch.disconnect();
      requestAnimationFrame(() => { window.moved = {ms: performance.now() - began, empty}; }); } };
  const watch = new MutationObserver(look); watch.observe(document.body, {attributes: true, subtree: true}); })()"""


class Browser:
    """A headless Chromium, driven over its DevTools pipe: no port, no driver, no further package."""

    def __init__(self, executable: str) -> None:
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        self._profile = tempfile.mkdtemp(prefix="chromium")
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
        # A window that nobody looks at must not be slowed down.
        flags += ["--disable-background-timer-throttling", "--disable-renderer-backgrounding"]
        flags += ["--disable-backgrounding-occluded-windows", "--disable-features=CalculateNativeWinOcclusion"]
        flags += ["--disable-extensions", "--hide-scrollbars", f"--user-data-dir={self._profile}", "about:blank"]
        # Chromium talks on descriptors 3 and 4.
        shell = f'exec 3<&{theirs_in} 4>&{theirs_out}; exec "$@"'
        self._process = subprocess.Popen(
            ["sh", "-c", shell, "sh", executable, *flags],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._number, self._rest = 0, b""
        target = self._call("Target.createTarget", {"url": "about:blank"})["targetId"]
        self._session = self._call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        self.call("Page.enable")
        self.call("Runtime.enable")

    def call(self, method: str, **given: Any) -> dict[str, Any]:
        return self._call(method, given, self._session)

    def send(self, method: str, **given: Any) -> int:
        return self._send(method, given, self._session)

    def answer(self, number: int) -> dict[str, Any]:
        while True:
            message = self._receive()
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(message["error"]["message"])
                return dict(message["result"])

    def ask(self, expression: str) -> Any:
        return self.value(self.answer(self.start(expression)))

    def until(self, expression: str, limit: float = 60.0) -> Any:
        """The expression's value once it is true. Asks again and again: a browser without a screen may give no frame to
        a page that nobody asks anything."""
        end = time.monotonic() + limit
        while not (value := self.ask(expression)):
            if time.monotonic() > end:
                raise RuntimeError(f"not within {limit:g} s: {expression}")
            time.sleep(0.01)
        return value

    def start(self, expression: str) -> int:
        return self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)

    @staticmethod
    def value(result: dict[str, Any]) -> Any:
        if "exceptionDetails" in result:
            raise RuntimeError(json.dumps(result["exceptionDetails"])[:500])
        return result["result"].get("value")

    def key(self, letter: str) -> None:
        code = letter.upper()
        common = {"key": letter, "code": f"Key{code}", "windowsVirtualKeyCode": ord(code)}
        self.send("Input.dispatchKeyEvent", type="keyDown", text=letter, **common)
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def screenshot(self, path: Path, width: int, height: int, scale: float, mobile: bool) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=mobile
        )
        self.ask("new Promise(done => setTimeout(done, 400))")
        data = self.call("Page.captureScreenshot", format="jpeg", quality=72)["data"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        self._send("Browser.close", {}, None)
        self._process.wait(timeout=20)
        os.close(self._in)
        os.close(self._out)
        shutil.rmtree(self._profile, ignore_errors=True)

    def _call(self, method: str, given: dict[str, Any], session: str | None = None) -> dict[str, Any]:
        return self.answer(self._send(method, given, session))

    def _send(self, method: str, given: dict[str, Any], session: str | None) -> int:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": given}
        if session:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        return self._number

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            piece = os.read(self._in, 1 << 20)
            if not piece:
                raise RuntimeError("the browser is gone")
            self._rest += piece
        one, self._rest = self._rest.split(b"\0", 1)
        return dict(json.loads(one))


def other_reader(address: str, token: str, name: str, ids: list[str], faults: list[str]) -> None:
    """Labels everything through the page's interface, as fast as it goes."""
    with httpx.Client(base_url=address, headers={"authorization": f"Bearer {token}"}, timeout=60.0) as client:
        for one in ids:
            body = {"person": name, "verdict": "success", "share": 1.0, "seconds": 1.0}
            answer = client.post(f"/api/episodes/{one}/label", json=body)
            if answer.status_code != 200:
                faults.append(f"{name}: {answer.text}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="12 episodes instead of 100")
    parser.add_argument("--browser", default=shutil.which("chromium") or shutil.which("google-chrome") or "chromium")
    parser.add_argument("--screenshots", type=Path, help="folder for images of the page")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/review.json")
    arguments = parser.parse_args(argv)
    count, unique = (12, 2) if arguments.quick else (100, 5)
    robot = two_cameras(256)
    console = Console(width=100)
    console.print(f"rendering {unique} rollouts", style="dim")
    made = [rollout(robot, TASKS[i % len(TASKS)], i, 60, stop=False) for i in range(unique)]
    folder = Path(tempfile.mkdtemp(prefix="review"))
    store = EpisodeStore(folder, create=True)
    fill(store, robot, made, count, labelled=False)
    ids = list(store.cards())
    command = [sys.executable, "-c", "import sys; from ratchet_vla.cli.main import main; sys.exit(main())", "review"]
    environment = {**os.environ, "PYTHONPATH": python_path(inherited=False), "COLUMNS": "200"}
    server = subprocess.Popen(
        [*command, "--store", str(folder), "--port", "0"], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert server.stdout is not None
    url = next(line for line in server.stdout if "http://" in line).split()[-1]
    address, _, token = url.partition("/?token=")
    overhead: list[float] = []
    faults: list[str] = []
    began = time.monotonic()
    browser = Browser(arguments.browser)
    try:
        browser.call("Emulation.setDeviceMetricsOverride", width=1200, height=900, deviceScaleFactor=1, mobile=False)
        browser.call("Page.navigate", url=url)
        browser.ask(
            "new Promise(done => { const t = setInterval(() => { if (document.readyState === 'complete' && "
            "document.getElementById('task').options.length) { clearInterval(t); done(); } }, 50); })"
        )
        browser.ask(f"document.getElementById('speed').value = '{SPEED}'")
        # What the other readers have labelled meanwhile is still to be labelled by this one.
        browser.ask("document.getElementById('state').value = ''")
        browser.ask(
            "(() => { const p = document.getElementById('annotator'); p.value = 'Ada'; "
            "p.dispatchEvent(new Event('change')); })()"
        )
        others = [
            threading.Thread(target=other_reader, args=(address, token, f"reader {i}", ids, faults)) for i in range(3)
        ]
        for thread in others:
            thread.start()
        for number in track(range(count), "labelling", console=console):
            browser.until(PLAYED)
            browser.ask(NEXT)
            browser.key("f" if number % 3 == 0 else "s")
            told = browser.until("window.moved")
            if not told["empty"]:
                overhead.append(told["ms"] / 1e3)
        for thread in others:
            thread.join()
        if arguments.screenshots:
            _images(browser, arguments.screenshots)
    finally:
        browser.close()
        server.terminate()
        server.wait()
    annotations = Annotations(EpisodeStore(folder))
    labels = [label for one in ids for label in annotations.labels(one)]
    mine = [label for label in labels if label.annotator == "Ada"]
    lost = 3 * count - sum(label.annotator != "Ada" for label in labels) + count - len({x.episode for x in mine})
    watched = [label.viewed.share for label in mine]
    shutil.rmtree(folder)
    p50, p99 = np.percentile(overhead, [50, 99])
    took = time.monotonic() - began
    table = Table(title=f"{count} episodes judged in a headless browser, four readers at once")
    for column in ("beyond playback", "seconds"):
        table.add_column(column, justify="left" if column == "beyond playback" else "right")
    for name, value in (("median", p50), ("99th percentile", p99), ("longest", max(overhead))):
        table.add_row(name, f"{value:.3f}")
    console.print(table)
    result = {
        "command": ["python", "-m", "benchmarks.episodes.review", *(sys.argv[1:] if argv is None else argv)],
        "machine": machine(),
        "repeats": len(overhead),
        "headline": {"median_s": float(p50), "labels_lost": lost},
        "spread": {"p50_s": float(p50), "p99_s": float(p99), "max_s": max(overhead)},
        "labels": {"of_the_page": len(mine), "of_the_others": len(labels) - len(mine), "faults": faults},
        "frames_seen_share_median": float(np.median(watched)) if watched else 0.0,
        "seconds_in_all": took,
        "goal": {"median_s": GOAL, "labels_lost": 0},
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    for fault in faults[:3]:
        print(fault, file=sys.stderr)
    print(f"{len(mine)} labels by keyboard, {len(labels) - len(mine)} by three others meanwhile, {lost} lost")
    print(f"review: {p50:.3f} s per episode beyond playback, median (goal < {GOAL:g} s, 0 labels lost)")
    return 0 if p50 < GOAL and lost == 0 and not faults else 1


def _images(browser: Browser, folder: Path) -> None:
    """The page in the middle of an episode, on a desk and on a phone."""
    browser.ask(
        "(() => { const s = document.getElementById('state'); s.value = ''; s.dispatchEvent(new Event('change')); })()"
    )
    browser.ask(
        "(() => { const p = document.getElementById('annotator'); p.value = 'Grace'; "
        "p.dispatchEvent(new Event('change')); })()"
    )
    browser.until(PLAYED)
    browser.ask(
        "(() => { const s = document.getElementById('scrub'); s.value = 450; s.dispatchEvent(new Event('input')); })()"
    )
    browser.screenshot(folder / "review.jpg", 1200, 940, 1.0, False)
    browser.screenshot(folder / "review-phone.jpg", 390, 844, 1.5, True)


if __name__ == "__main__":
    sys.exit(main())
