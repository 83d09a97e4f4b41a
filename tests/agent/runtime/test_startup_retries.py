"""A node that tries for ever what cannot work hides it in a full log; one that gives up on a slow driver never starts.

Pinned: which codes are waited for, which are tried again, and that whatever is not named so ends the process. Pure.
"""

from __future__ import annotations

import pytest

from ratchet_vla.runtime.startup_retries import passes, waits


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("ros.no_data", "waits"),
        ("ros.no_arm", "waits"),
        ("policy.crashed", "passes"),
        ("policy.start_timeout", "passes"),
        ("recorder.disk_low", "passes"),
        ("ros.second_publisher", "passes"),
        ("session.busy", "passes"),
        ("contract.missing_file", "stays"),
        ("compat.refused", "stays"),
        ("adapter.unknown", "stays"),
        ("adapter.wrong_base", "stays"),
        ("policy.bad_checkpoint", "stays"),
        ("recorder.bad_config", "stays"),
        ("ros.bad_parameter", "stays"),
        ("ros.internal", "stays"),
        ("sim.unknown_task", "stays"),
    ],
)
def test_what_time_may_mend(code: str, kind: str) -> None:
    assert (waits(code), passes(code)) == (kind == "waits", kind != "stays")
