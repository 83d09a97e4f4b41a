"""`ratchet learner`, `robot`, `sync`, `keys`, `session` and `status`: robot and learner apart.

Knows addresses, keys and folders. The work is the link's and the service's.
Begin with `learner` and `robot`.
"""
