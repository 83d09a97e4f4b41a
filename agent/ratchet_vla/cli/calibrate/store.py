"""The folder of calibrations that all verbs of `ratchet calibrate` work on unless told otherwise."""

from pathlib import Path

CALIBRATIONS = Path("calibrations")
