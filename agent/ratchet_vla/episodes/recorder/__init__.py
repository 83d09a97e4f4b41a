"""Recording beside a control loop: another process encodes and writes, the loop never waits.

Knows shared memory, the file and the store. Knows no robot and no camera driver.
Begin with `client`, which the control process holds; `process` is the other end.
"""
