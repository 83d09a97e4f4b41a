"""Files that survive a power cut: written beside, synced, renamed; hashes and canonical JSON.

Knows POSIX, bytes and JSON. Knows nothing of adapters, episodes or messages.
Begin with `documents`: one whole file replaced at once.
"""
