"""Policies that integrate a flow from noise to actions: pi0, pi0.5 and SmolVLA.

Knows the flow, its stochastic form for learning, and real-time chunking. Knows no checkpoint's file names.
Begin with `policy`; `sde` gives its log-probabilities.
"""
