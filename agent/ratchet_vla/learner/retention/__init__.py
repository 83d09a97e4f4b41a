"""What holds an adapter near what could be done before: earlier decisions, as terms of the loss.

Knows recorded decisions, divergences and their weights. Knows no simulator, no schedule and no update rule. Begin with
`regulariser.Retention`; `reference_set.ReferenceSet` is the file that belongs to a base.
"""
