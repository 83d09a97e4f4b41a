"""The last thing an action passes before the arm, on by default; not a safety-rated function.

Knows the contract's limits, ages and times. Knows no policy and no message.
Begin with `filter`; what goes in and comes out is in `types`.
"""
