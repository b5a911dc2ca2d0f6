"""Learning-rate schedule of every stage: linear warm-up, then cosine to zero (paper section 3.1)."""

import math


def warmup_cosine(step: int, total_steps: int, warmup_ratio: float) -> float:
    """Factor on the peak learning rate at `step` (0-based), in [0, 1].

    The warm-up takes ceil(warmup_ratio * total_steps) steps and starts above zero, so that no step is wasted.
    """
    warmup = math.ceil(warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total_steps - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
