"""`ratchet study`: methods times seeds over one sequence of tasks, resumable, with one report.

Knows a study's folder. The measures are ratchet_vla.learner's.
Begin with `verb`.
"""
