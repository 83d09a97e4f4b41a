"""The safety node: the independent command filter between whoever commands and the arm's own topics.

Knows the contract alone. Knows no policy.
Begin with `node`, then `command_filter`.
"""
