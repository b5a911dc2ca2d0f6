"""Step `train`: one stage, a row of the stage table run by DeepSpeed under torchrun."""
