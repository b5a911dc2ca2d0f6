"""Step `evaluate`: what the model can do before training and after each stage, beside what needs no picture."""
