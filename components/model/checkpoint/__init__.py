"""Weights on the disk: layouts, shards, conversion, loading and the serving form."""
