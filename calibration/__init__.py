"""Camera calibration: boards, intrinsics, hand-eye, stored with uncertainty under the hash of their content."""
