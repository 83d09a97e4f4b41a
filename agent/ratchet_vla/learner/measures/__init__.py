"""Success rates with their intervals, and the measures of continual learning.

Knows counts. Knows no policy and no environment.
Begin with `metrics`.
"""
