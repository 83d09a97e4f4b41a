"""Where the camera is on the arm, or beside it, with its uncertainty, or why that cannot be told.

Knows views and poses. Moves an arm only through `arms.protocol`.
Begin with `estimate`.
"""
