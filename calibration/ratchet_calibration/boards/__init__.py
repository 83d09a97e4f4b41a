"""The calibration board, its corners in an image, and which views say something new.

Knows one image at a time. Knows no camera's model beyond its pixels.
Begin with `board`.
"""
