"""What a cluster runs around the DAG."""
