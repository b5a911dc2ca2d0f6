"""What people and programs are shown of a run, and the README's tables."""
