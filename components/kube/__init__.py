"""Talks to Kubernetes: the connection, patient requests, and the objects of a namespace as plain data."""
