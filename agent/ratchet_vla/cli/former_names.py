"""Verbs and options that were renamed: the former name works for two more minor releases and says what it is now.

Knows names and where they stand on the command line. Knows no verb's class: the translation happens before parsing, so
that help, errors and completion only ever show the present names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Renaming:
    """One name that changed.

    Attributes:
        verb: present names of the verbs before it, such as ("ctl", "label"); () for a verb of `ratchet` itself.
        former: the name as it was, `--person` for an option; an option also stands for its group (`--person.note`).
        present: the name as it is now.
        gone_in: the release that does not know the former name any more.
    """

    verb: tuple[str, ...]
    former: str
    present: str
    gone_in: str = "0.3"

    def sentence(self) -> str:
        """Say what is now called what; the verb of `ratchet` itself is written out as a command."""
        if self.former.startswith("-"):
            return f"`{self.former}` is now `{self.present}`"
        before = " ".join(("ratchet", *self.verb))
        return f"`{before} {self.former}` is now `{before} {self.present}`"


RENAMINGS: tuple[Renaming, ...] = (
    Renaming((), "courier", "sync"),
    Renaming(("eval",), "--sight", "--vision-ablation"),
    Renaming(("pretrain",), "--eyes", "--localisation"),
    Renaming(("status",), "--story", "--timeline"),
    Renaming(("ctl",), "judge", "label"),
    Renaming(("ctl", "label"), "--person", "--annotator"),
    Renaming(("episodes",), "judge", "label"),
    Renaming(("episodes", "label"), "--person", "--annotator"),
    Renaming(("review",), "--person", "--annotator"),
    Renaming(("up", "real"), "--person", "--operator"),
    Renaming(("up", "sim"), "--judge", "--labeller"),
    Renaming(("calibrate", "drift"), "--person", "--operator"),
    Renaming(("calibrate", "drift"), "--picture", "--image"),
)


def translate(arguments: Sequence[str], renamings: Sequence[Renaming] = RENAMINGS) -> tuple[list[str], list[Renaming]]:
    """Translate a command line into present names; with the renamings that this took, each once.

    A verb is renamed only where a verb stands, before the first option, and an option only behind its own verb: a task
    or a person called like a former verb stays.
    """
    present = list(arguments)
    used: list[Renaming] = []
    verb = _translate_verbs(present, renamings, used)
    _translate_options(present, verb, renamings, used)
    return present, used


def _translate_verbs(present: list[str], renamings: Sequence[Renaming], used: list[Renaming]) -> tuple[str, ...]:
    """Put present names for the verbs of a command line, in place; returns the words before the first option."""
    verb: tuple[str, ...] = ()
    for position, word in enumerate(present):
        if word.startswith("-"):
            break
        for renaming in renamings:
            if renaming.verb == verb and renaming.former == word:
                present[position] = renaming.present
                used.append(renaming)
                break
        verb = (*verb, present[position])
    return verb


def _translate_options(
    present: list[str], verb: tuple[str, ...], renamings: Sequence[Renaming], used: list[Renaming]
) -> None:
    """Put present names for the options of a verb, in place."""
    for position, word in enumerate(present):
        option = re.match(r"--[\w-]+", word)
        if option is None:
            continue
        name = option[0].replace("_", "-")  # options are taken with hyphens or with underscores between their words
        for renaming in renamings:
            if renaming.former == name and verb[: len(renaming.verb)] == renaming.verb:
                present[position] = renaming.present + word[option.end() :]
                if renaming not in used:
                    used.append(renaming)
                break


def notice(renamings: Sequence[Renaming]) -> str:
    """Word one line for the user about everything that was renamed in one command."""
    sentences = ", ".join(renaming.sentence() for renaming in renamings)
    releases = " and ".join(sorted({renaming.gone_in for renaming in renamings}))
    names = "the old name goes" if len(renamings) == 1 else "the old names go"
    return f"{sentences}; {names} with {releases}"
