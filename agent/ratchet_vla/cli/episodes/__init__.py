"""`ratchet episodes` and `ratchet review`: list, show, label, export, import.

Knows a store of episodes. Knows no learner.
Begin with `verbs`.
"""
