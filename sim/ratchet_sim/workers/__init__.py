"""Many episodes at once: worker processes that host environments, here or as Ray actors.

Knows shared memory and processes. Knows no task's inside.
Begin with `vector`.
"""
