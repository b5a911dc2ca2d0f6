"""Submitting to a Kubeflow Pipelines server."""
