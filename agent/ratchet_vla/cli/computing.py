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
    """Dtype of the policy's matrix products; auto takes what this device does fast (see `ratchet doctor`). The value of
    RATCHET_DTYPE if absent. Ids and stored adapters do not depend on it."""

    def apply(self) -> None:
        """Let this process, and those that it starts, compute in this dtype."""
        if self.dtype:
            from ratchet_vla.policy.computing import VARIABLE  # loads torch: only where it is used

            os.environ[VARIABLE] = self.dtype
