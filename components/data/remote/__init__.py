"""Weights in a bucket or on the hub: brought whole, compared with the origin's checksums and kept; see `data.fetch`."""
