"""LIBERO behind TaskEnv, with resets that do not recompile, and its scripted expert.

Knows robosuite and MuJoCo. Knows no policy.
Begin with `env`; `suites` lists the tasks.
"""
