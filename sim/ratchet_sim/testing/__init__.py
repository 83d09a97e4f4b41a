"""Yardsticks for tests and benchmarks: the benchmark's own LIBERO environment, an expert with noise.

Knows simulators. Nothing in the product imports it.
Begin with `libero_reference`.
"""
