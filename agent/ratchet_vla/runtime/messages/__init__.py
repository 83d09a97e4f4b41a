"""From an arm's messages to observations: fields by name, upright images, aligned in time.

Knows what messages hold. Imports no ROS.
Begin with `readings`, then `align`.
"""
