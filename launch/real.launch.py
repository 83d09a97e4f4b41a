"""The nodes of a real arm whose own driver runs already.

`ros2 launch real.launch.py contract:=… policy:=…`
Check first with `ratchet doctor --contract …`. Without the launch package, `ratchet up real` starts the same graph.
"""

from launch.actions import DeclareLaunchArgument, SetEnvironmentVariable, Shutdown
from launch.conditions import IfCondition
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import LifecycleNode
from launch_ros.substitutions import FindPackageShare

from launch import LaunchDescription

VITAL = ("safety_node", "policy_node")  # without these there is nothing to launch


def generate_launch_description() -> LaunchDescription:
    arguments = [
        DeclareLaunchArgument("contract", description="Path of the robot contract (YAML)."),
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
        DeclareLaunchArgument("resume", default_value="manual", description="After a hold: automatic or manual."),
        DeclareLaunchArgument(
            "dead_man", default_value="false", description="true: move only while the dead-man switch is held."
        ),
        DeclareLaunchArgument(
            "record_wire",
            default_value="none",
            description="Record topics as on the wire, too: none, messages (all but images) or all.",
        ),
        DeclareLaunchArgument(
            "robot", default_value="runs/robot", description="Folder of the robot, which keeps its sessions."
        ),
        DeclareLaunchArgument(
            "episodes", default_value="runs/episodes", description="Episode store to record into; empty for none."
        ),
        DeclareLaunchArgument("teleop", default_value="false", description="Start teleop_node; needs a joy driver."),
        DeclareLaunchArgument("teleop_params", default_value="", description="Parameter file of teleop_node."),
        DeclareLaunchArgument(
            "namespace", default_value="", description="Namespace, such as left for one of two arms."
        ),
        DeclareLaunchArgument("log_level", default_value="info", description="debug, info, warn, error or fatal."),
        DeclareLaunchArgument(
            "dds_profile",
            default_value=PathJoinSubstitution([FindPackageShare("ratchet_ros"), "config", "fastdds.xml"]),
            description="Fast DDS profile; camera drivers outside this file must load it as well.",
        ),
    ]
    contract = LaunchConfiguration("contract")
    safe = {"resume": LaunchConfiguration("resume"), "dead_man": LaunchConfiguration("dead_man")}

    def node(executable: str, parameters: list[object], **options: object) -> LifecycleNode:
        return LifecycleNode(
            package="ratchet_ros",
            executable=executable,
            name=executable,
            namespace=LaunchConfiguration("namespace"),
            output="both",
            on_exit=Shutdown(reason=f"{executable} ended") if executable in VITAL else None,
            arguments=["--ros-args", "--log-level", LaunchConfiguration("log_level")],
            parameters=[{"autostart": True, "contract": contract}, *parameters],
            **options,
        )

    return LaunchDescription(
        [
            *arguments,
            SetEnvironmentVariable("FASTDDS_DEFAULT_PROFILES_FILE", LaunchConfiguration("dds_profile")),
            SetEnvironmentVariable("FASTRTPS_DEFAULT_PROFILES_FILE", LaunchConfiguration("dds_profile")),
            node("safety_node", [safe]),
            node(
                "policy_node",
                [
                    safe,
                    {
                        "policy": LaunchConfiguration("policy"),
                        "store": LaunchConfiguration("store"),
                        "adapter": LaunchConfiguration("adapter"),
                        "policy_python": LaunchConfiguration("policy_python"),
                        "mode": LaunchConfiguration("mode"),
                        "robot": LaunchConfiguration("robot"),
                        "episodes": LaunchConfiguration("episodes"),
                        "record_wire": LaunchConfiguration("record_wire"),
                    },
                ],
            ),
            node(
                "teleop_node",
                [LaunchConfiguration("teleop_params")],
                condition=IfCondition(LaunchConfiguration("teleop")),
            ),
        ]
    )
