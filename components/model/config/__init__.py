"""What a model is: its configuration, read from and written to the reference's files."""
