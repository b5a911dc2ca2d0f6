"""NVILA itself: preprocessing, architecture, checkpoints and generation, in plain torch."""
