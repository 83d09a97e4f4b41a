"""Experience: episodes sampled in many environments, or recorded ones admitted and read back.

Knows environments by protocol, and which episode may count. Knows no gradient.
Begin with `collection`; recorded episodes enter by `intake` and `samples`.
"""
