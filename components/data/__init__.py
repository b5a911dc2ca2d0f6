"""Samples and media: what `validate` found good, read and decoded for every later step."""
