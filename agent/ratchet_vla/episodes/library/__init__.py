"""Many episodes: a folder with an append-only index, and who labelled which of them.

Knows ids, labels and what is eligible. Knows no page and no export.
Begin with `store`.
"""
