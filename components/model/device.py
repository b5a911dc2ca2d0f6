"""Which device a process computes on: its GPU where it has one, else the CPU."""

from __future__ import annotations

import os

import torch


def default_device() -> str:
    """`cuda:N` with this process's number under torchrun (`LOCAL_RANK`, else 0), or `cpu`."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
