"""Messages: an arm's and our own, to and from records; names, times and quality of service.

Knows ROS types. Knows no node.
Begin with `decode` and `encode`.
"""
