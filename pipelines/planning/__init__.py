"""What `nvila plan` works out: shapes, memory, hours, cache hits, and what the cluster would refuse."""
