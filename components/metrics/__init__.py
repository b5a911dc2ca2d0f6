"""What a model can do: exact match with intervals, baselines that need no picture, answers to held-out questions."""
