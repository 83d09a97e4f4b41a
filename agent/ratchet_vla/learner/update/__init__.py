"""One update: a batch of on-policy episodes in, changed adapter parameters out.

Knows advantages, losses and ranks. Knows no environment and no file.
Begin with `grpo`, then `step`, which runs it.
"""
