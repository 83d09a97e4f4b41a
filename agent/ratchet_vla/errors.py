"""The one error type users see.

Knows how a refusal is worded: a stable code, what is wrong, where, and what to do.
Knows nothing about any subsystem; each subsystem owns the codes it raises.
"""

from __future__ import annotations

__all__ = ["RatchetError"]

# Present code -> the code that releases before 0.3 raised in its place. Scripts match on codes, so a renamed one names
# its former self wherever a machine reads it, for two minor releases.
FORMER_CODES: dict[str, str] = {
    "vision_ablation.same_scene": "sight.same_scene",
    "calibration.no_images": "calibration.no_pictures",
    "drift.no_operator": "drift.no_person",
    "episode.no_annotator": "episode.no_person",
    "episode.unknown_label": "episode.bad_verdict",
    "import.bad_label": "import.bad_verdict",
    "link.no_annotator": "link.no_person",
    "safety.no_operator": "safety.no_person",
    "up.no_operator": "up.no_person",
}


class RatchetError(Exception):
    """A refusal with a stable code, shown to the user as exactly one line.

    Args:
        code: stable dotted identifier, `<subsystem>.<reason>`, such as `adapter.wrong_base`.
            Scripts and tests match on it: one that is renamed all the same has its line in `FORMER_CODES`.
        what: what is wrong, in one clause.
        where: file, field, tensor or device concerned; empty if there is none.
        fix: what the user should do next; empty only where nothing can be done.
    """

    def __init__(self, code: str, what: str, *, where: str = "", fix: str = "") -> None:
        self.code = code
        self.what = what
        self.where = where
        self.fix = fix
        place = f" ({where})" if where else ""
        remedy = f"; {fix}" if fix else ""
        former = f", formerly {FORMER_CODES[code]}" if code in FORMER_CODES else ""
        super().__init__(" ".join(f"[{code}{former}] {what}{place}{remedy}".splitlines()))

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions cross process borders in the rollout workers; keyword arguments need help.
        return (_rebuild, (type(self), self.code, self.what, self.where, self.fix))

    def as_dict(self) -> dict[str, str]:
        """The arguments that make this error again, in another process or on another machine."""
        return {"code": self.code, "what": self.what, "where": self.where, "fix": self.fix}

    def for_json(self) -> dict[str, str]:
        """The same for a user's script, with `former_code` where the code was renamed."""
        former = {"former_code": FORMER_CODES[self.code]} if self.code in FORMER_CODES else {}
        return {**self.as_dict(), **former}


def _rebuild(cls: type[RatchetError], code: str, what: str, where: str, fix: str) -> RatchetError:
    return cls(code, what, where=where, fix=fix)
