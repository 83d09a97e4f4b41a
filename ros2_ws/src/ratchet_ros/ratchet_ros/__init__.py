"""Ratchet's ROS 2 nodes: thin over ratchet_vla.runtime, which knows no ROS.

Knows topics, lifecycles and messages. Decides nothing that the runtime decides.
Begin with `policy.node` and `safety.node`.
"""

import os

# Read once, when a message module is imported. Without it a field of a wrong type (an int for a float) is not noticed
# before it is serialised, and there it ends the process: no exception, no hold.
os.environ.setdefault("ROS_PYTHON_CHECK_FIELDS", "1")
