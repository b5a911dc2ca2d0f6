"""Promotions on a cluster: reads the registry and the cluster, decides, acts, every few seconds."""
