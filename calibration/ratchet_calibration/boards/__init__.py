"""The calibration board, its corners in a picture, and which views say something new.

Knows one picture at a time. Knows no camera's model beyond its pixels.
Begin with `board`.
"""
