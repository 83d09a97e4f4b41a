"""RobotContract: a contract read from a file or from plain data, checked, with the id of its content."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ratchet_vla.contract.checking import require_sound
from ratchet_vla.contract.plain_data import build
from ratchet_vla.contract.specs import ContractSpec
from ratchet_vla.errors import RatchetError


@dataclass(frozen=True)
class RobotContract(ContractSpec):
    """Everything that the rest of the system may assume about one robot. See `robots/*.yaml`."""

    @classmethod
    def load(cls, path: str | Path) -> RobotContract:
        """Read and validate a contract.

        Raises:
            RatchetError: contract.missing_file, contract.bad_yaml, contract.unknown_field, contract.missing_field,
                contract.wrong_type, contract.bad_value; each names file and field.
        """
        path = Path(path)
        if not path.is_file():
            names_beside = ", ".join(sorted(file.name for file in path.parent.glob("*.yaml"))) or "none"
            raise RatchetError(
                "contract.missing_file", "no such contract", where=str(path), fix=f"contracts there: {names_beside}"
            )
        try:
            raw = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise RatchetError(
                "contract.bad_yaml", str(error), where=str(path), fix="correct the YAML syntax"
            ) from None
        return cls.from_dict(raw, str(path))

    @classmethod
    def from_dict(cls, raw: Any, where: str = "contract", *, rules: bool = True) -> RobotContract:
        """Validate plain data, such as `to_dict` gives or YAML holds; raises like `load`.

        rules: False checks names and types only, for a contract that was in force when an older version recorded.
        """
        contract: RobotContract = build(cls, raw, where)
        if rules:
            require_sound(contract, where)
        return contract

    def to_dict(self) -> dict[str, Any]:
        """Plain data with lists for tuples; limits may be infinite."""
        # Through JSON because `asdict` leaves tuples as they are.
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    @property
    def id(self) -> str:
        """SHA-256 of the contract's content; comments, key order in the YAML and measurements do not matter."""
        content = dataclasses.asdict(self)
        # Measurements say how well the contract was checked, not what the robot is.
        del content["verified"]
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()
