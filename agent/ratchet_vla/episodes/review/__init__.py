"""Episodes in front of a person: a page for browser and phone, the terminal, Rerun.

Knows how frames become images. Knows no policy and no learner.
Begin with `server`; the page itself is in `page/`.
"""
