"""NVILA itself: preprocessing, architecture, checkpoints and generation, in plain torch.

The paper is arXiv 2412.04468, version 3. The reference is the repository NVlabs/VILA; files `llava/...` are its.
"""
