"""Weights from files: our own form, OpenVLA's, LeRobot's, and what a person states where a file does not.

Knows file names, tensor names and dtypes. Knows nothing of how a policy is used afterwards.
Begin with `own`, then `adopted`: any published form taken into use.
"""
