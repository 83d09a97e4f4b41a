"""LoRA layers on a policy's module, with all of an adapter's tensors in one block of memory.

Knows modules and memory. Knows no file and no tag.
Begin with `layers`.
"""
