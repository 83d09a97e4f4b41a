"""Simulated tasks: suites of tasks behind one environment, workers that host many, a robot that wraps one.

Knows simulators and contracts. Knows no policy's inside and no learning.
Begin with `base` (one task) and `registry` (suites by name).
"""
