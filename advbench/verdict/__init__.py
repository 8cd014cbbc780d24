"""Whether a robust accuracy can be trusted: indicators, and the label that follows from them.

An indicator is a small function in the file of its family and an entry in ``registry.INDICATORS``.
"""
