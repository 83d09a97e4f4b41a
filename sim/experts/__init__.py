"""Scripted experts that stand in for a teleoperator in simulation."""
