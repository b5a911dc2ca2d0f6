"""Step `initialize`: the model that stage 1 starts from."""
