"""`python -m ratchet_ros NAME …`: a node or a tool by the name that `ros2 run ratchet_ros` knows it by.

Knows names. Loads only what is named.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Run what the first argument names with the arguments that are left; its exit status."""
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    match name:
        case "policy_node":
            from ratchet_ros.policy import node as policy_node

            return policy_node.main()
        case "safety_node":
            from ratchet_ros.safety import node as safety_node

            return safety_node.main()
        case "camera_node":
            from ratchet_ros.devices import camera as camera_node

            return camera_node.main()
        case "teleop_node":
            from ratchet_ros.devices import teleop as teleop_node

            return teleop_node.main()
        case "sim_robot_node":
            from ratchet_ros.devices import sim_robot as sim_robot_node

            return sim_robot_node.main()
        case "robot_driver_check":
            from ratchet_ros.tools import robot_driver_check

            return robot_driver_check.main()
        case "ctl":
            from ratchet_ros.tools import ctl

            return ctl.main()
        case "doctor":
            from ratchet_ros.tools import doctor

            return doctor.main()
    print(f"ratchet_ros has no '{name}'", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
