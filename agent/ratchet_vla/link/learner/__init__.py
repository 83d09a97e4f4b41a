"""The learner's end: files taken into an inbox, adapters given out, state told to every robot.

Knows robots by their keys. Knows nothing of what the files say.
Begin with `server`.
"""
