"""Supervised training: a small base from scratch, and adapters warm-started from demonstrations.

Knows samples and losses. Knows no reward.
Begin with `training`.
"""
