"""The container images that the steps run in; the cluster compiler replaces them by pinned ones."""

IMAGE = "nvila-python:0.1.0"
"""Name with `python` in it: KFP's local runner warns about images that may hold no Python."""
QUANTIZE_IMAGE = "nvila-python-quantize:0.1.0"
"""Has the serving environment with vLLM beside the main one."""
