"""Step `prune`: which of the SFT data stays, by DeltaLoss or another method."""
