"""`ratchet calibrate`: boards, cameras, arms, drift, and a calibration's id into the contract.

Knows persons and devices. The estimates are ratchet_calibration's.
Begin with `verbs`.
"""
