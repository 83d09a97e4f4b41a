"""Episodes in other people's forms: LeRobot's data sets, HDF5, recordings of demonstrations; out and back in.

Knows their layouts and checks every number. Knows no training.
Begin with `rows` (an episode as rows), then `lerobot_export`.
"""
