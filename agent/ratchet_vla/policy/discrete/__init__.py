"""Policies that say their actions as tokens: OpenVLA, OpenVLA-OFT, and the small built-in one.

Knows action bins, prompts and their network. Knows no checkpoint's file names.
Begin with `policy`; `network` is what it runs.
"""
