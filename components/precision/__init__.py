"""Products of matrices in FP8: which Linears, by which library, and what a training engine has to do for it."""
