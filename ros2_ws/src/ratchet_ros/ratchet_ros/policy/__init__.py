"""The policy node: cameras and state in, commands for the safety node out; tasks, adapters, recording.

Knows the runtime's loop. Knows no limit of the arm: that is the safety node's.
Begin with `node`.
"""
