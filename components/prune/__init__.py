"""Step `prune`: DeltaLoss pruning of the SFT data."""
