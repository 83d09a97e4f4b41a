"""Between a robot and its learner: files and state over ZeroMQ with CURVE, resumable and authenticated.

Knows messages, keys and files. Knows neither episodes' contents nor learning.
Begin with `wire`; then the end that interests you, `robot` or `learner`.
"""
