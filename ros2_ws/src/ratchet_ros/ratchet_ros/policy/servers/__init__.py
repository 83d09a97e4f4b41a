"""What policy_node serves: tasks, adapters, recordings by hand and labels, faults, its status.

Knows the parts of a configured node. Makes none of them.
Begin with `task_server`.
"""
