"""What training a base will need, before any of it is rented: memory, disk, network, time.

Knows architectures by their sizes. Loads no weights.
Begin with `requirements`.
"""
