"""Step `base`: the model that stage 1 starts from."""
