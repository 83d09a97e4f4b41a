"""What the linter still finds in code from before a rule was set: counted by package, and only ever less.

Knows the block `extend-per-file-ignores` of pyproject.toml, one line per package, each rule with its count. A package
whose findings of a rule grow is refused, and so is a rule that a package no longer breaks; `--lower` takes down what
became less, `--accept` puts down everything as it is, where a rule is new. Rules that stay away from a file on purpose
are in `per-file-ignores`, with their reason, and not here.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
HEAD = "[tool.ruff.lint.extend-per-file-ignores]\n"
LINE = re.compile(r'^"(?P<package>[^"]+)/\*\*" = \[[^\]]*\]  # (?P<counts>.+)$')
WINGS = "agent/ratchet_vla/"  # each of its packages has a line; other source roots have one each

Debt = dict[str, dict[str, int]]
"""Findings that are exempt: package -> rule -> count."""


def package_of(file: str) -> str:
    """The package that a file counts for, as a path from the root."""
    parts = PurePosixPath(file).parts
    in_wing = file.startswith(WINGS) and len(parts) > 3
    return "/".join(parts[:3] if in_wing else parts[:1])


def count(findings: Iterable[tuple[str, str]]) -> Debt:
    """Count findings, each a file (path from the root) and a rule."""
    debt: Debt = {}
    for file, rule in findings:
        rules = debt.setdefault(package_of(file), {})
        rules[rule] = rules.get(rule, 0) + 1
    return debt


def parse(settings: str) -> Debt:
    """Read the block from the text of pyproject.toml."""
    debt: Debt = {}
    block = settings.split(HEAD, 1)[1].split("\n[", 1)[0]
    for line in block.splitlines():
        entry = LINE.match(line)
        if entry is not None:
            words = entry["counts"].split(", ")
            debt[entry["package"]] = {rule: int(number) for rule, number in (word.split() for word in words)}
    return debt


def render(debt: Mapping[str, Mapping[str, int]]) -> str:
    """Lines of the block, packages and rules in order."""
    lines = []
    for package, rules in sorted(debt.items()):
        if rules:
            names = ", ".join(f'"{rule}"' for rule in sorted(rules))
            counts = ", ".join(f"{rule} {number}" for rule, number in sorted(rules.items()))
            lines.append(f'"{package}/**" = [{names}]  # {counts}\n')
    return "".join(lines)


def complaints(allowed: Mapping[str, Mapping[str, int]], found: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Say where findings grew, and which exemptions nothing needs any more; empty where all is well."""
    said = []
    for package in sorted({*allowed, *found}):
        before, now = Counter(allowed.get(package, {})), Counter(found.get(package, {}))
        for rule in sorted({*before, *now}):
            if now[rule] > before[rule]:
                said.append(f"{package}: {rule} found {now[rule]} times, {before[rule]} were there; ruff rule {rule}")
            elif before[rule] and not now[rule]:
                said.append(f"{package}: {rule} is not broken any more; `make lint-debt` takes the exemption away")
    return said


def with_exemptions(settings: str, debt: Mapping[str, Mapping[str, int]]) -> str:
    """Put a debt into the text of pyproject.toml in place of the one that is there."""
    before, rest = settings.split(HEAD, 1)
    _, *following = rest.split("\n[", 1)
    after = "\n[" + following[0] if following else ""
    return before + HEAD + render(debt) + after


def findings(settings: str) -> list[tuple[str, str]]:
    """What ruff finds in the tree without the exemptions: file and rule."""
    with tempfile.TemporaryDirectory() as folder:  # an empty table on ruff's command line would add, not replace
        bare = Path(folder, "pyproject.toml")
        bare.write_text(with_exemptions(settings, {}))
        ruff = Path(sysconfig.get_path("scripts"), "ruff")
        command = [str(ruff), "check", "--config", str(bare), "--output-format", "json", "--exit-zero", "."]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    return [(Path(finding["filename"]).relative_to(ROOT).as_posix(), finding["code"]) for finding in found]


def lowered(allowed: Mapping[str, Mapping[str, int]], found: Mapping[str, Mapping[str, int]]) -> Debt:
    """The debt after what was mended: no count above the one that was allowed."""
    return {
        package: {rule: min(number, found[package][rule]) for rule, number in rules.items() if rule in found[package]}
        for package, rules in allowed.items()
        if package in found
    }


def main(arguments: list[str]) -> int:
    """Check the counts; with `--lower` or `--accept`, put them down first."""
    settings = (ROOT / "pyproject.toml").read_text()
    allowed, found = parse(settings), count(findings(settings))
    if "--lower" in arguments or "--accept" in arguments:
        allowed = found if "--accept" in arguments else lowered(allowed, found)
        (ROOT / "pyproject.toml").write_text(with_exemptions(settings, allowed))
    said = complaints(allowed, found)
    for line in said:
        print(line)
    return 1 if said else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
