"""A run as one self-contained page.

Knows a run's folder. Knows no training.
Begin with `page`.
"""
