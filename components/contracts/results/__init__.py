"""The result of each step: a frozen model of its own, which its manifest carries. Whose is which stands in `steps`.

A new field needs a default, which is not written: so a manifest of an earlier version keeps its digest.
"""
