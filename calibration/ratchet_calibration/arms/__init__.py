"""What calibration needs of an arm, and whether its actions do what the contract says.

Knows small announced motions. Knows no driver.
Begin with `action_checks`.
"""
