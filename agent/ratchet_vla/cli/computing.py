"""The option `--dtype`, which every verb that runs a policy has.

Knows an environment variable: processes that the verb starts compute in the same dtype.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class ComputingOptions:
    """Inherited by the verbs."""

    dtype: Literal["", "auto", "float32", "bfloat16", "float16"] = ""
    """What the policy's products are computed in; auto: what this device does fast (`ratchet doctor` tells). What
    RATCHET_DTYPE says if absent. Ids and stored adapters do not depend on it."""

    def apply(self) -> None:
        """Let this process and those that it starts compute so."""
        if self.dtype:
            from ratchet_vla.policy.computing import VARIABLE  # torch is loaded by those who compute

            os.environ[VARIABLE] = self.dtype
