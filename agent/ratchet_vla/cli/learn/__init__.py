"""`ratchet learn`, `pretrain`, `demo` and `report`: learning in simulation, on one machine.

Knows suites, run folders and progress. The learning is ratchet_vla.learner's.
Begin with `verb`, then `sequential`.
"""
