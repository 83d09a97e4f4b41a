"""Calibration: boards, cameras, hand-eye, action checks; stored with uncertainty under their content's hash.

Knows images, poses and contracts. Knows no policy, no ROS and no simulator.
Begin with `boards.board`, then `store.record` (what a calibration says).
"""
