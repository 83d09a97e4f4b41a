"""Studies: several methods and seeds, what they say together, and why an update forgets or does not.

Knows success matrices and updates. Runs nothing itself.
Begin with `results`.
"""
