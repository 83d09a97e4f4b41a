"""The store of adapters on one machine: folders under their ids, tags that point at them.

Knows files. Knows no running policy.
Begin with `folder`.
"""
