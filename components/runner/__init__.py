"""Runs one step: key, skip or work, manifest, tracking, status file, exit code."""
