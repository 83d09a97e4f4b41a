"""The robot's end: a durable outbox, uploads, adapters fetched and believed only by their hash.

Knows one learner's address. Knows no policy that runs.
Begin with `client`.
"""
