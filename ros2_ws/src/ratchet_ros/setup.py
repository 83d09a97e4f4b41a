"""The ament_python package of the nodes. `agent` and `sim` come from the ratchet-vla package of the same version."""

from glob import glob

from setuptools import setup

NODES = {
    "policy_node": "ratchet_ros.policy_node",
    "safety_node": "ratchet_ros.safety_node",
    "camera_node": "ratchet_ros.camera_node",
    "teleop_node": "ratchet_ros.teleop_node",
    "sim_robot_node": "ratchet_ros.sim_robot_node",
    "robot_driver_check": "ratchet_ros.robot_driver_check",
}

setup(
    name="ratchet_ros",
    version="0.1.0",
    packages=["ratchet_ros"],
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
