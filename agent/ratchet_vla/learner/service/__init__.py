"""The learner as a process: takes episodes in, updates, asks the gate, promotes; may die at any moment.

Knows the link's learner end and its own journal. Knows no arm.
Begin with `learner`, then `state` (where it stands, folded from the journal).
"""
