"""What users may import and rely on: the list, and the page `docs/api.md` made of it.

Knows which modules are public, by package. Of those, `__all__` says which names are; a name that is imported from
elsewhere is looked up there. Modules are parsed, not imported. `python -m tests.api_page` (`make api`) writes the page.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "api.md"
SOURCES = {"ratchet_vla": "agent", "ratchet_sim": "sim", "ratchet_calibration": "calibration"}

PUBLIC: dict[str, tuple[str, ...]] = {
    "ratchet_vla": ("ratchet_vla.errors", "ratchet_vla.records"),
    "ratchet_vla.contract": ("ratchet_vla.contract",),
    "ratchet_vla.policy": (
        "ratchet_vla.policy.protocol",
        "ratchet_vla.policy.checkpoints.adopted",
        "ratchet_vla.policy.checkpoints.own",
        "ratchet_vla.policy.inspection",
        "ratchet_vla.policy.presets",
        "ratchet_vla.policy.noise",
        "ratchet_vla.policy.discrete.policy",
        "ratchet_vla.policy.flow.policy",
    ),
    "ratchet_vla.adapters": (
        "ratchet_vla.adapters.protocol",
        "ratchet_vla.adapters.identity",
        "ratchet_vla.adapters.store.folder",
        "ratchet_vla.adapters.lora.layers",
        "ratchet_vla.adapters.swap.hotswap",
        "ratchet_vla.adapters.peft_format",
        "ratchet_vla.adapters.exchange",
    ),
    "ratchet_vla.episodes": (
        "ratchet_vla.episodes.file.format",
        "ratchet_vla.episodes.file.reader",
        "ratchet_vla.episodes.file.recording",
        "ratchet_vla.episodes.file.writer",
        "ratchet_vla.episodes.library.store",
        "ratchet_vla.episodes.recorder.client",
        "ratchet_vla.episodes.exchange.lerobot_export",
        "ratchet_vla.episodes.exchange.hdf5",
        "ratchet_vla.episodes.exchange.imports",
    ),
    "ratchet_vla.link": (
        "ratchet_vla.link.keys",
        "ratchet_vla.link.robot.client",
        "ratchet_vla.link.learner.server",
    ),
    "ratchet_vla.runtime": (
        "ratchet_vla.runtime.robots.protocol",
        "ratchet_vla.runtime.cameras.devices",
        "ratchet_vla.runtime.clock",
        "ratchet_vla.runtime.control.loop",
        "ratchet_vla.runtime.control.chunks",
        "ratchet_vla.runtime.control.sink",
        "ratchet_vla.runtime.inference.chunk_server",
        "ratchet_vla.runtime.inference.client",
        "ratchet_vla.runtime.inference.server",
        "ratchet_vla.runtime.safety.filter",
    ),
    "ratchet_vla.learner": (
        "ratchet_vla.learner.sequence",
        "ratchet_vla.learner.rollouts.batch",
        "ratchet_vla.learner.rollouts.collection",
        "ratchet_vla.learner.rollouts.specs",
        "ratchet_vla.learner.update.step",
        "ratchet_vla.learner.update.grpo",
        "ratchet_vla.learner.update.ppo",
        "ratchet_vla.learner.supervised.objectives",
        "ratchet_vla.learner.supervised.training",
        "ratchet_vla.learner.methods.base",
        "ratchet_vla.learner.methods.registry",
        "ratchet_vla.learner.gate.keeper",
        "ratchet_vla.learner.measures.intervals",
        "ratchet_vla.learner.measures.metrics",
    ),
    "ratchet_vla.testing": (
        "ratchet_vla.testing.conformance.camera",
        "ratchet_vla.testing.conformance.policy",
        "ratchet_vla.testing.conformance.robot",
        "ratchet_vla.testing.conformance.store",
        "ratchet_vla.testing.conformance.swap",
    ),
    "ratchet_sim": ("ratchet_sim.base", "ratchet_sim.registry", "ratchet_sim.robot", "ratchet_sim.workers.vector"),
    "ratchet_calibration": (
        "ratchet_calibration.arms.protocol",
        "ratchet_calibration.boards.board",
        "ratchet_calibration.boards.detection",
        "ratchet_calibration.cameras.model",
        "ratchet_calibration.cameras.intrinsics",
        "ratchet_calibration.handeye.estimate",
        "ratchet_calibration.store.record",
        "ratchet_calibration.store.folder",
    ),
}
INTERNAL = {
    "ratchet_vla.cli": "the command `ratchet` is the way in; its modules are not",
    "ratchet_vla.plan": "what `ratchet plan` counts",
    "ratchet_vla.paths": "where the checkout lies",
    "ratchet_vla.storage": "how files become durable",
}

HEAD = """# What can be imported

Made from the code by `make api`. What stands here keeps its name and its place, or an alias in both, for two minor
releases; everything else may move without a word. A name is imported from the module above its table.
"""


@dataclass(frozen=True)
class Name:
    """A public name. summary: first paragraph of its docstring, on one line; empty where it has none."""

    name: str
    summary: str


@functools.cache
def parsed(module: str) -> ast.Module:
    """The syntax tree of a module, given by its import name."""
    place = ROOT / SOURCES[module.split(".", 1)[0]] / Path(*module.split("."))
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return ast.parse(file.read_text())


def exported(module: str) -> list[str] | None:
    """`__all__` as written; None where there is none."""
    for statement in parsed(module).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(statement.value)
            return names
    return None


def summary_of(module: str, name: str) -> str | None:
    """First paragraph of what documents a name: a docstring, or the text below an assignment.

    Returns:
        One line; empty where nothing documents it, None where the module has no such name.
    """
    body = parsed(module).body
    for statement, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(statement, ast.ClassDef | ast.FunctionDef) and statement.name == name:
            return _paragraph(ast.get_docstring(statement))
        if name in _assigned(statement):
            text = following.value if isinstance(following, ast.Expr) else None
            return _paragraph(text.value if isinstance(text, ast.Constant) and isinstance(text.value, str) else None)
        if isinstance(statement, ast.ImportFrom) and any(alias.name == name for alias in statement.names):
            return summary_of(statement.module or "", name)
    return None


def _assigned(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.Assign):
        return [ast.unparse(target) for target in statement.targets]
    return [ast.unparse(statement.target)] if isinstance(statement, ast.AnnAssign) else []


def _paragraph(text: str | None) -> str:
    return " ".join((text or "").strip().split("\n\n", 1)[0].split())


def names(module: str) -> Iterator[Name]:
    """The public names of a module, as `__all__` orders them."""
    for name in exported(module) or []:
        yield Name(name, summary_of(module, name) or "")


def page() -> str:
    """The whole of docs/api.md."""
    lines = [HEAD]
    for package, modules in PUBLIC.items():
        lines.append(f"\n## {package}\n")
        for module in modules:
            lines += [
                f"\n**`{module}`**: {_paragraph(ast.get_docstring(parsed(module)))}\n",
                "\n| name | |\n|---|---|\n",
            ]
            lines += [f"| `{entry.name}` | {entry.summary.replace('|', '&#124;')} |\n" for entry in names(module)]
    return "".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page())
