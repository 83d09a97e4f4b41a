"""Meta-World V3 behind TaskEnv: 50 tasks, the benchmark's physics and predicate.

Knows Meta-World and MuJoCo. Knows no policy.
Begin with `env`.
"""
