"""Step preflight: what the run will need is there."""
