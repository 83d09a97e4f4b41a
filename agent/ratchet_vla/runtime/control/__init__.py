"""The fixed-rate loop: observe, decide, check, command; when an episode is over and how it ended.

Knows protocols of arm, policy and recorder. Knows no device and no model.
Begin with `loop`, then `chunks` (collect and deploy).
"""
