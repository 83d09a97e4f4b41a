"""Asking a live graph: `ratchet ctl` and `doctor`, topics against the contract, a dry run.

Knows the graph from outside. Commands no arm.
Begin with `checks`.
"""
