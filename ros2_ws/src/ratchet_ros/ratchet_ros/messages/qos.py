"""Quality of service as ROS users expect it, one name per use.

Knows profiles only. Subscriptions to what drivers publish are best effort: they connect to either kind.
"""

from __future__ import annotations

from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy


def _profile(depth: int, reliable: bool, latched: bool = False) -> QoSProfile:
    return QoSProfile(
        history=HistoryPolicy.KEEP_LAST,
        depth=depth,
        reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE,
    )


IMAGES = _profile(2, reliable=False)
"""Camera images: sensor data, the newest counts."""
STATES = _profile(5, reliable=False)
"""Joint states and poses: sensor data."""
STATES_RELIABLE = _profile(10, reliable=True)
"""What we publish as a driver."""
COMMANDS = _profile(10, reliable=True)
"""Commands to drivers and between our nodes."""
STATUS = _profile(1, reliable=True, latched=True)
"""Status: whoever joins late gets the last one."""
EVENTS = _profile(100, reliable=True)
"""Events, chunks and applied commands: for recorders."""
MARKS = _profile(10, reliable=True, latched=True)
"""Begin and end of episodes."""
STOP_BUTTONS = (STATUS, _profile(10, reliable=True))
"""The emergency stop, listened to twice: a button that stays pressed reaches whoever joins late, and one that is
published plainly, as `ros2 topic pub` does, is heard too."""
INPUT = _profile(1, reliable=False)
"""What a person's hand does."""
CLOCK = _profile(1, reliable=False)
"""/clock of a simulation that runs by itself."""
CLOCK_DRIVER = _profile(10, reliable=True)
"""/clock as we publish it."""
LOCK_STEP = _profile(4, reliable=True, latched=True)
"""Everything that a simulation in lock-step sends: nothing may be lost, and whoever joins late gets the present moment,
which is not sent again before somebody commands."""
