"""The policy in a process of its own: started, asked over shared memory, its adapter exchanged.

Knows two ends of a socket. The control process's end loads no model.
Begin with `source` (what a loop asks), `client` and `worker`.
"""
