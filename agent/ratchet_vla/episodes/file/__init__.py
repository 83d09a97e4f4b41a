"""One episode in one MCAP file: written append-only, read back as it was.

Knows the format. Knows no store, no label and no process.
Begin with `format`, then `reader`.
"""
