"""Creates a distributed job for a step, attaches to it, follows it, and cancels it."""
