"""The report is what people see of a run; a wrong cell, a remote image or a crash on half a run makes it worthless.

Pinned: the page parses, loads nothing from anywhere, escapes what it shows, names every part that is missing, and
shows the matrix's own numbers; the terminal's table fits 100 columns. Determinism: a seeded synthetic run.
"""

from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.measures.metrics import Cell, SuccessMatrix, measures
from ratchet_vla.learner.report.charts import diagnostic_curves, segments, success_curve
from ratchet_vla.learner.report.page import print_matrix, render, write_report
from ratchet_vla.learner.report.run_folder import load_run, video_name
from tests.agent.learner.sample_run import HELD_OUT, TASKS, sample_comparison, sample_matrix, write_sample_run

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Collects images, text and links, and fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.addresses: list[str] = []
        self.text = ""
        self.tags: set[str] = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = dict(attrs)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "srcset", "action", "data") and v]
        if tag == "img":
            self.images.append(values)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_sample_run(tmp_path / "run")
    return tmp_path / "run"


def test_page_is_valid_and_self_contained(folder: Path) -> None:
    path = write_report(folder)
    assert path == folder / "report.html"
    text = path.read_text()
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert page.tags.isdisjoint({"script", "link", "iframe", "object"})
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert "http" not in text.replace("http-equiv", "")
    assert "url(" not in text
    kinds = []
    for image in page.images:
        source = image["src"]
        assert source
        assert image["alt"]
        head, content = source.split(",", 1)
        decoded = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))
        assert head == f"data:image/{str(decoded.format).lower()};base64"
        kinds.append(str(decoded.format))
    assert sorted(kinds) == ["GIF", "GIF", "GIF", "PNG", "PNG"]
    assert "Missing from this run" not in page.text
    assert not list(folder.glob("*.partial"))


def test_page_shows_the_numbers_of_the_matrix(folder: Path) -> None:
    page = Page(render(load_run(folder)))
    matrix = sample_matrix()
    for cell in matrix.cells.values():
        assert f"{cell.successes}/{cell.trials}" in page.text
    result = measures(matrix)
    for value in (result.avg, result.nbt, result.fwt, result.zs):
        assert value is not None
        figure, bounds = value.percent().split(" ", 1)
        assert figure in page.text
        assert bounds in page.text
    for shown in (*TASKS, *HELD_OUT, "seq_ft", "ab" * 32, "grpo.clip_high", "0.28", "1 h 18 min", "train 0-24"):
        assert shown in page.text, shown


def test_what_it_shows_is_escaped(folder: Path) -> None:
    text = render(load_run(folder))
    assert TASKS[1] in Page(text).text
    assert "<the>" not in text


@pytest.mark.parametrize("absent", ["run.json", "matrix.json", "updates.jsonl", "adapters.json", "videos"])
def test_a_missing_part_is_named_and_the_rest_is_shown(folder: Path, absent: str) -> None:
    path = folder / absent
    if path.is_dir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    else:
        path.unlink()
    page = Page(render(load_run(folder)))
    assert "Missing from this run" in page.text
    assert absent in page.text
    assert HELD_OUT[0] in page.text or absent == "matrix.json"


def test_a_shipped_adapter_is_shown_against_its_base_with_what_it_cost(folder: Path) -> None:
    data = sample_comparison()
    (folder / "comparison.json").write_text(json.dumps(data))
    (folder / "matrix.json").unlink()
    for path in (folder / "videos").iterdir():
        path.rename(path.with_name(path.name.replace("__after", "__adapter").replace("__before", "__base")))
    text = render(load_run(folder))
    page = Page(text)
    words = " ".join(page.text.split())
    assert "Missing from this run" not in words
    change = data["change"]
    bounds = f"[{100 * change['low']:+.0f}, {100 * change['high']:+.0f}]"
    assert f"{100 * change['estimate']:+.0f} points {bounds}" in words
    assert "larger than its interval" in words
    assert "NOT larger" not in words
    # A mark per state, in the same order for both: 9 and 19 of 20, then 15 and 18.
    marks = text.split('class="marks">')[1:]
    assert [m.split("</td>")[0].count("●") for m in marks] == [9, 19, 15, 18]
    assert [m.split("</td>")[0].count("●") + m.split("</td>")[0].count("○") for m in marks] == [20] * 4
    assert marks[0].index("state-30") < marks[0].index("state-49")
    # What was lost on a task that it never learned is there, and that it was not measured now.
    assert HELD_OUT[0] in words
    row = text[text.rindex(HELD_OUT[0], 0, text.index("Not measured in this run")) :].split("</tr>")[0]
    for cell in ("60 %", "20 %", "8 / 0 of 20"):
        assert f'<td class="n">{cell}</td>' in row
    assert '<td class="n fell">-40 [' in row, "what fell stands out"
    assert "Not measured in this run" in words
    assert "3 of 16" in words
    assert "5a5a5a5a5a5a -> 6b6b6b6b6b6b" in words
    assert "seq_ft: ratchet demo --suite x" in words
    sides = [str(i["alt"]).rpartition(", ")[2] for i in page.images if str(i["src"]).startswith("data:image/gif")]
    assert sides == ["adapter", "base", "adapter"], "of the first task only one was recorded"
    assert "Continual learning" not in words.replace("Ratchet: continual learning", "")


def test_no_gain_is_called_no_gain(folder: Path) -> None:
    data = sample_comparison()
    data["change"]["low"] = -0.01
    (folder / "comparison.json").write_text(json.dumps(data))
    assert "NOT larger than its interval" in " ".join(Page(render(load_run(folder))).text.split())


@pytest.mark.parametrize("text", ["{", "[]", '{"verdict": {}}', '{"verdict": 3, "change": null}'])
def test_a_damaged_comparison_is_named(folder: Path, text: str) -> None:
    (folder / "comparison.json").write_text(text)
    page = Page(render(load_run(folder)))
    assert "comparison.json" in page.text
    assert "Continual learning after stage" in " ".join(page.text.split())


def test_an_empty_folder_gives_a_page_that_says_so(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path).read_text())
    for name in ("run.json", "matrix.json", "updates.jsonl", "adapters.json", "videos"):
        assert name in page.text
    assert page.images == []


def test_damaged_files_are_named_not_fatal(folder: Path) -> None:
    (folder / "run.json").write_text("{")
    (folder / "adapters.json").write_text("{}")
    (folder / "matrix.json").write_text('{"schema": 99}')
    with (folder / "updates.jsonl").open("a") as file:
        file.write('{"task": "push-v3", "upd')
    run = load_run(folder)
    assert len(run.updates) == 15
    assert [line.split(":")[0] for line in run.missing] == ["run.json", "adapters.json", "matrix.json", "updates.jsonl"]
    assert "line 16" in Page(render(run)).text


def test_updates_may_lack_keys(folder: Path) -> None:
    (folder / "updates.jsonl").write_text('{"task": "a", "loss": NaN}\n{"task": "a", "episodes": 0}\n{}\n')
    page = Page(render(load_run(folder)))
    assert len([i for i in page.images if str(i["src"]).startswith("data:image/png")]) == 2


def test_measures_are_those_after_the_last_complete_stage(folder: Path) -> None:
    matrix = sample_matrix()
    del matrix.cells[(3, TASKS[2])]
    matrix.save(folder / "matrix.json")
    page = Page(render(load_run(folder)))
    assert "after stage 2 of 3" in " ".join(page.text.split())


def test_no_such_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RatchetError) as caught:
        write_report(tmp_path / "absent")
    assert caught.value.code == "report.no_run"


def test_charts_draw_the_data() -> None:
    updates = [{"task": "a", "episodes": 10, "successes": k, "loss": 0.1 * k} for k in (2, 5, 9)]
    updates += [{"task": "b", "episodes": 10, "successes": 4, "loss": 0.3}]
    assert segments(updates) == [("a", 0, 3), ("b", 3, 4)]
    for draw in (success_curve, diagnostic_curves):
        png = draw(updates)
        assert png == draw(updates)
        other = draw([{**u, "successes": 0, "loss": 1.0} if i == 1 else u for i, u in enumerate(updates)])
        decoded, changed = (np.asarray(Image.open(io.BytesIO(x)).convert("L")) for x in (png, other))
        assert decoded.shape[1] > 900
        assert (decoded.shape != changed.shape) or (decoded != changed).any()


def printed(matrix: SuccessMatrix) -> list[str]:
    stream = io.StringIO()
    print_matrix(matrix, Console(file=stream, width=100))
    return stream.getvalue().splitlines()


def test_terminal_table_fits_and_loses_nothing() -> None:
    lines = printed(sample_matrix())
    text = "".join(lines)
    assert max(map(len, lines)) <= 100
    assert "…" not in text
    # A folded name continues in the same column of the next line.
    names = "".join(line.split("│")[2].strip() for line in lines if line.startswith("│"))
    assert names == "".join((*TASKS, *HELD_OUT))
    assert any(line.startswith("AVG  after stage 3: ") for line in lines)
    assert any(line.startswith("NBT  after stage 3: ") for line in lines)


def test_terminal_table_of_many_stages_is_printed_in_parts() -> None:
    tasks = tuple(f"a_rather_long_task_name_number_{i}" for i in range(10))
    matrix = SuccessMatrix(tasks, ("held",))
    for stage in matrix.stages:
        for task in matrix.columns:
            matrix.record(stage, task, Cell(40, 40))
    lines = printed(matrix)
    assert max(map(len, lines)) <= 100
    text = "".join(lines)
    assert "…" not in text
    assert all(f"stage {k}" in text for k in range(1, 11))
    assert text.count("100 [91-100]") == 11 * 11


def test_terminal_table_before_any_stage() -> None:
    lines = printed(SuccessMatrix(("a", "b")))
    assert "no stage has been measured" in lines[-1]


def test_video_names_are_safe_file_names() -> None:
    assert video_name("open <the> [top] drawer/2", "before") == "open-the-top-drawer-2__before.gif"
