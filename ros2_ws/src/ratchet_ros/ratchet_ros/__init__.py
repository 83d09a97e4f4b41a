"""Ratchet's ROS 2 nodes: thin over agent.runtime, which knows no ROS."""

import os

# Read once, when a message module is imported. Without it a field of a wrong type (an int for a float) is not noticed
# before it is serialised, and there it ends the process: no exception, no hold.
os.environ.setdefault("ROS_PYTHON_CHECK_FIELDS", "1")
