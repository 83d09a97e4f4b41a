"""Learning: rollouts and recorded episodes in, a measured and gated adapter out.

Knows policies, adapters and numbers. Knows no simulator: environments are handed in.
Begin with `sequence` (tasks one after the other) or `update.grpo` (one update).
"""
