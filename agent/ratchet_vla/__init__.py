"""Ratchet: run a vision-language-action model on an arm and let it improve between sessions.

Knows one description of a robot (`contract`) and what is built on it. Knows no simulator, no ROS, no vendor's library.
Begin with docs/architecture.md, then `contract` and `records`.
"""

__version__ = "0.1.0"
