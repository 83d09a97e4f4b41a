"""A person's hands: devices as intents, intents as commands of any contract.

Knows devices and limits. Knows no recorder.
Begin with `operator`.
"""
