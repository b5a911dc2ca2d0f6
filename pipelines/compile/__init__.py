"""From the DAG to a package for a Kubeflow cluster."""
