"""Layers that several families of policies are built from: linear layers, a Llama trunk, vision towers.

Knows tensors. Knows no action, no token's meaning and no checkpoint.
Begin with `trunk`.
"""
