"""Low-rank adapters: what one is, where it is kept, and how the running policy changes to another.

Knows tensors, ids and PEFT's files. Knows no robot, no training and no network link.
Begin with `identity` (what an id covers) and `protocol` (what a store offers).
"""
