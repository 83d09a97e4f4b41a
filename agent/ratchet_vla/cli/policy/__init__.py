"""`ratchet run`, `eval`, `inspect`, `adopt` and `plan`: one policy, driven, measured, looked into.

Knows a simulated robot and the runtime. Knows no training.
Begin with `run`.
"""
