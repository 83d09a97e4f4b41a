"""Calibrations as data: records, the folder that keeps them, their tie to a contract, other programs' forms.

Knows files. Estimates nothing.
Begin with `record`.
"""
