"""A camera's model and intrinsics, whether it is the right camera, and whether it has moved.

Knows views of a board. Knows no arm.
Begin with `model`, then `intrinsics`.
"""
