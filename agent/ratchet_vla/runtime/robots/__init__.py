"""What a control loop may ask of an arm, real or simulated.

Knows a protocol and the arms behind it. Knows no policy.
Begin with `protocol`.
"""
