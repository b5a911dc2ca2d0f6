"""Step `validate`: which of the user's records are good, and what is wrong with the others."""
