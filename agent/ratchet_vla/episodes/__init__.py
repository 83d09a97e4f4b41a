"""What happened on the arm, kept for good: recorded, found again, labelled by people, and carried elsewhere.

Knows files and records. Knows no learner, no policy and no ROS node.
Begin with `file.format` (what an episode is on disk) and `library.store`.
"""
