"""A calibration board in MuJoCo and a simulated arm that looks at it: calibration with a known truth.

Knows every number of its cameras. Calibration is not told them.
Begin with `scene`.
"""
