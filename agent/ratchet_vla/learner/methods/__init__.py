"""Sequential fine-tuning and the methods that it is compared with, each by how it differs.

Knows hooks around an update. Knows no environment.
Begin with `base`; names are in `registry`.
"""
