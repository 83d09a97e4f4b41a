"""The ament_python package of the nodes. What they run comes from the ratchet-vla package of the same version."""

from glob import glob

from setuptools import find_packages, setup

NODES = {
    "policy_node": "ratchet_ros.policy.node",
    "safety_node": "ratchet_ros.safety.node",
    "camera_node": "ratchet_ros.devices.camera",
    "teleop_node": "ratchet_ros.devices.teleop",
    "sim_robot_node": "ratchet_ros.devices.sim_robot",
    "robot_driver_check": "ratchet_ros.tools.robot_driver_check",
}

setup(
    name="ratchet_ros",
    version="0.1.0",
    packages=find_packages(include=["ratchet_ros", "ratchet_ros.*"]),
    data_files=[
        ("share/ament_index/resource_index/packages", ["resource/ratchet_ros"]),
        ("share/ratchet_ros", ["package.xml"]),
        ("share/ratchet_ros/config", glob("config/*")),
        ("share/ratchet_ros/launch", glob("../../../launch/*.launch.py")),
    ],
    install_requires=["setuptools"],
    zip_safe=True,
    maintainer="Ratchet maintainers",
    maintainer_email="maintainers@ratchet.invalid",
    description="Lifecycle nodes that run a vision-language-action model on an arm, real or simulated",
    license="Apache-2.0",
    entry_points={"console_scripts": [f"{name} = {module}:main" for name, module in NODES.items()]},
)
