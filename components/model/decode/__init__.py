"""Answers: decoding with a cache, freely or after a schema."""
