"""The command `ratchet`: verbs in folders by the same nouns as the packages, thin and loaded late.

Knows options, progress and exit codes. Whatever it decides is decided below it.
Begin with `main`.
"""
