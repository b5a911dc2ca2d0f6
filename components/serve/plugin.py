"""The vLLM plugin's entry point: makes the architecture, its config and our media connector known to vLLM.

vLLM calls `register` in every process it starts (entry point group `vllm.general_plugins`). The model itself is named
by a string, so that registering imports no torch; what it says is in `model`, `processing`, `tower` and `connector`.
"""

from __future__ import annotations

import multiprocessing
import signal

from nvila.components.contracts.children import die_with_parent
from nvila.components.contracts.environment import before_importing

ARCHITECTURE = "NVILAForConditionalGeneration"
CONNECTOR = "nvila"


def register() -> None:
    """Register everything; safe to call again. Processes that vLLM starts, the engine first, end with theirs."""
    if parent := multiprocessing.parent_process():
        die_with_parent(parent.pid or 0, signal.SIGKILL)
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from nvila.components.serve.config import NVILAServingConfig
    from nvila.components.serve.connector import register_connector

    AutoConfig.register(NVILAServingConfig.model_type, NVILAServingConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, f"nvila.components.serve.architecture:{ARCHITECTURE}")
    register_connector(CONNECTOR)
    before_importing("vllm")
