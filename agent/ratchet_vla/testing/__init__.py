"""Stand-ins and conformance suites, for our tests and for those of plug-ins.

Knows what it stands for. Nothing in the product imports it.
Begin with `conformance`.
"""
