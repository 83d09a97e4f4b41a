"""Ratchet's ROS 2 nodes: thin over agent.runtime, which knows no ROS."""
