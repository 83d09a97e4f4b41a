"""Exchanging the running adapter between two chunks, or refusing to without a trace.

Knows the running policy and a store. Knows no robot and no wire.
Begin with `hotswap`.
"""
