"""The robot's side: a policy's chunks carried to an arm, checked, recorded, in sessions.

Knows contracts, clocks and processes. Knows no ROS, no simulator and no learning.
Begin with `control.loop`; every action then passes `safety.filter`.
"""
