"""The container image that the steps run in; the cluster compiler replaces it by a pinned one."""

IMAGE = "nvila-python:0.1.0"
"""Name with `python` in it: KFP's local runner warns about images that may hold no Python."""
