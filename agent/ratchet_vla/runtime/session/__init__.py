"""A robot's sessions: opened, continued after a kill, ended; what goes to the learner, what it requested.

Knows the robot's folder. Knows no control loop.
Begin with `manifest`, then `controller`.
"""
