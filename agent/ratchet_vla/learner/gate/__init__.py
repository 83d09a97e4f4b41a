"""The gate: candidate against active adapter on the same episodes; nothing is promoted unmeasured.

Knows outcomes and bounds. Knows no training.
Begin with `decision`; `keeper` runs the episodes.
"""
