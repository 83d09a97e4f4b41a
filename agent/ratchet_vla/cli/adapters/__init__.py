"""`ratchet adapters`: what is in a store, promotion and rollback, PEFT folders in and out.

Knows a store on this machine. Knows no running arm.
Begin with `verbs`.
"""
