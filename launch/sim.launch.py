"""The same nodes as on a real arm, with a simulated one behind the topics.

`ros2 launch sim.launch.py policy:=…`
Without the launch package, `ratchet up sim` starts the same graph.
"""

from launch.actions import DeclareLaunchArgument, Shutdown
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import LifecycleNode

from launch import LaunchDescription


def generate_launch_description() -> LaunchDescription:
    arguments = [
        DeclareLaunchArgument("contract", description="Path of the suite's robot contract (YAML)."),
        DeclareLaunchArgument("suite", default_value="metaworld", description="Suite of the task."),
        DeclareLaunchArgument("task", default_value="door-open", description="Name of the task in the suite."),
        DeclareLaunchArgument(
            "initial_state", default_value="-1", description="Id of the initial state; -1 for the first training state."
        ),
        DeclareLaunchArgument("speed", default_value="1.0", description="Simulated seconds per real second."),
        DeclareLaunchArgument(
            "lock_step", default_value="false", description="true: simulated time waits for the policy."
        ),
        DeclareLaunchArgument("policy", description="Folder of the policy."),
        DeclareLaunchArgument("store", default_value="", description="Folder of the adapter store; empty for none."),
        DeclareLaunchArgument(
            "adapter", default_value="", description="Id or tag of the adapter to start with; empty for the base."
        ),
        DeclareLaunchArgument(
            "policy_python",
            default_value="",
            description="Python interpreter of the policy process; empty for the nodes' own.",
        ),
        DeclareLaunchArgument(
            "mode", default_value="deploy", description="How chunks are executed: deploy or collect."
        ),
        DeclareLaunchArgument(
            "episodes", default_value="", description="Episode store to record into; empty for none."
        ),
        DeclareLaunchArgument(
            "record_wire",
            default_value="none",
            description="Record topics as on the wire, too: none, messages (all but images) or all.",
        ),
        DeclareLaunchArgument(
            "robot", default_value="runs/robot", description="Folder of the robot, which keeps its sessions."
        ),
        DeclareLaunchArgument("namespace", default_value="", description="ROS namespace of all nodes; empty for none."),
    ]
    contract = LaunchConfiguration("contract")
    lock_step = LaunchConfiguration("lock_step")

    def node(executable: str, parameters: list[object], **options: object) -> LifecycleNode:
        return LifecycleNode(
            package="ratchet_ros",
            executable=executable,
            name=executable,
            namespace=LaunchConfiguration("namespace"),
            output="both",
            on_exit=Shutdown(reason=f"{executable} ended"),
            parameters=[{"autostart": True, "contract": contract}, *parameters],
            **options,
        )

    timed = {"use_sim_time": True, "lock_step": lock_step}
    return LaunchDescription(
        [
            *arguments,
            node(
                "sim_robot_node",
                [
                    {
                        "suite": LaunchConfiguration("suite"),
                        "task": LaunchConfiguration("task"),
                        "initial_state": LaunchConfiguration("initial_state"),
                        "speed": LaunchConfiguration("speed"),
                        "lock_step": lock_step,
                    }
                ],
            ),
            node("safety_node", [timed]),
            node(
                "policy_node",
                [
                    timed,
                    {
                        "policy": LaunchConfiguration("policy"),
                        "store": LaunchConfiguration("store"),
                        "adapter": LaunchConfiguration("adapter"),
                        "policy_python": LaunchConfiguration("policy_python"),
                        "mode": LaunchConfiguration("mode"),
                        "judge": "scene",
                        "episodes": LaunchConfiguration("episodes"),
                        "record_wire": LaunchConfiguration("record_wire"),
                        "robot": LaunchConfiguration("robot"),
                    },
                ],
            ),
        ]
    )
