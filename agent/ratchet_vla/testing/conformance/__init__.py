"""What every robot, camera, policy, store and swapper must do: suites to inherit, as dm_env's are.

Knows protocols. Knows no implementation.
Begin with the suite of what you write; give its fixtures, inherit its tests.
"""
