"""The learner's service as a process of a launch, for a machine that also runs the robot's nodes or stands beside it.

It needs no ROS itself; `ratchet learner` alone does the same. Options are passed on as they are.
"""

import shlex

from launch.actions import DeclareLaunchArgument, ExecuteProcess, OpaqueFunction
from launch.substitutions import LaunchConfiguration

from launch import LaunchContext, LaunchDescription


def start(context: LaunchContext) -> list[ExecuteProcess]:
    """The command line, split as a shell would, without a shell."""
    ratchet = LaunchConfiguration("ratchet").perform(context)
    options = shlex.split(LaunchConfiguration("options").perform(context))
    return [ExecuteProcess(cmd=[ratchet, "learner", *options], output="both", sigterm_timeout="60")]


def generate_launch_description() -> LaunchDescription:
    return LaunchDescription(
        [
            DeclareLaunchArgument("ratchet", default_value="ratchet", description="The command; .venv/bin/ratchet."),
            DeclareLaunchArgument("options", default_value="", description="What `ratchet learner --help` lists."),
            OpaqueFunction(function=start),
        ]
    )
