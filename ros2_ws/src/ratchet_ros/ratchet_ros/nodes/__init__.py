"""What every node is built on: lifecycle, typed parameters, awaiting other threads' work.

Knows rclpy. Knows no robot.
Begin with `base`.
"""
