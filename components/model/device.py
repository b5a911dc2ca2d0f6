"""Which device a process computes on: its GPU where it has one, else the CPU; and how such a process is started."""

from __future__ import annotations

import os

import torch


def default_device() -> str:
    """`cuda:N` with this process's number under torchrun (`LOCAL_RANK`, else 0), or `cpu`."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def start_method() -> str:
    """Of `multiprocessing`: a fork has torch and transformers in memory already, but it cannot use CUDA."""
    return "spawn" if torch.cuda.is_available() else "fork"
