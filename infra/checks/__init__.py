"""What `helm test` runs in pods of the cluster: whether services answer, and locks hold between nodes."""
