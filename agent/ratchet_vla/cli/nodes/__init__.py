"""`ratchet up`, `ctl` and `doctor`: ROS nodes from a Python that has no ROS.

Knows processes and JSON lines. Imports no ROS.
Begin with `up`; `ros` finds the other Python.
"""
