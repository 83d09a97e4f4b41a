"""Cameras of a real arm: devices, and the newest frame of each.

Knows drivers, each imported only where it is used. Knows no calibration.
Begin with `devices`.
"""
