"""Which refusals time may mend: what a process that is coming up tries again, and what it ends with.

Knows codes. Knows no node and no process.
"""

from __future__ import annotations

import re

# Somebody else is not there yet, and that is nobody's fault.
_WAITS = re.compile(r"ros\.(no_data|no_arm|no_safety_node)")
# Something went wrong that may go right the next time: a policy process that died, a disk that was full, a node that is
# still ending.
_PASSES = re.compile(
    r"policy\.(crashed|hung|start_timeout|stopped|not_ready|failed|out_of_memory)"
    r"|recorder\.(disk_low|not_started|dead|failed)"
    r"|camera\.(not_found|lost|no_frames)"
    r"|episode\.in_use|ros\.second_publisher|session\.\w+|robot\.\w+|adapter\.busy"
)


def waits(code: str) -> bool:
    """Whether this only says that something else is not up yet."""
    return _WAITS.fullmatch(code) is not None


def passes(code: str) -> bool:
    """Whether trying again later may help. Everything else lies in what was given (contract, policy, adapter, a
    parameter), and stays."""
    return waits(code) or _PASSES.fullmatch(code) is not None
