"""Step `train`: one of the five stages, a row of the stage table run by DeepSpeed under torchrun."""
