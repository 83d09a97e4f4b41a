"""Nodes for what stands around the arm: cameras, a gamepad, a simulated arm.

Knows devices and topics. Knows no policy.
Begin with `camera`.
"""
