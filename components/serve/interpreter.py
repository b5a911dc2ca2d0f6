"""The serving environment: vLLM pins another set of libraries than training, so it runs in a venv of its own."""

from __future__ import annotations

import os
from pathlib import Path

from nvila.components.contracts.environment import current, for_child, name_of, named
from nvila.components.contracts.errors import PreflightError

PROCESSES_BYTES = 2 * 2**30
"""Of a server with hardly any weights, beside its cache; `tests/bench/endpoint.py` measures what all processes take."""


def serve_python() -> Path:
    """The interpreter that has vLLM.

    Looked for in `NVILA_SERVE_PYTHON`, then under the working directory, then beside an editable checkout.

    Raises:
        PreflightError: it is not there.
    """
    if given := current().serve_python:
        candidates = [given]
    else:
        checkout = Path(__file__).resolve().parents[2]
        candidates = [root / ".venv-serve" / "bin" / "python" for root in (Path.cwd(), checkout)]
    for path in candidates:
        if os.access(path, os.X_OK) and path.is_file():  # which raises where this process may not look
            return path.absolute()
    raise PreflightError(
        "the serving environment with vLLM is missing",
        where=(variable := name_of("serve_python")),
        value=[str(path) for path in candidates],
        do=f"Make it from requirements/serve.lock, or set {variable} to a Python that has it.",
    )


def envoy() -> Path:
    """The program Envoy of the serving environment: itself, where it is found, and else the script that starts it.

    Raises:
        PreflightError: it is not there.
    """
    folder = serve_python().parent
    candidates = [*folder.parent.glob("lib/python3*/site-packages/envoy/_bin/envoy"), folder / "envoy"]
    if found := next((path for path in candidates if os.access(path, os.X_OK)), None):
        return found
    raise PreflightError(
        "the serving environment has no Envoy", where=str(folder), do="Install requirements/serve.lock there."
    )


def serve_variables(threads: int = 1) -> dict[str, str]:
    """Environment variables for a vLLM process on this machine: offline, silent to the outside, small on a CPU.

    Args:
        threads: compute threads on a CPU. A second one gains little with a small model and costs a factor of five
            when another process wants the same core (threads that wait for each other), hence one.
    """
    here = current()
    variables = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_PLUGINS": "nvila",
        "VLLM_MEDIA_CONNECTOR": "nvila",
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
        "TOKENIZERS_PARALLELISM": "false",
        # The model runs eagerly. What vLLM compiles all the same (it counts log probabilities) is built by a C++
        # compiler when the first request asks for it, and a machine without one loses the engine to that request.
        "TORCH_COMPILE_DISABLE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        **named(vllm_cache_gib=here.vllm_cache_gib, vllm_binding=here.vllm_binding, threads=threads),
    }
    # PYTHONPATH and the like of the calling environment must not leak into another set of libraries.
    return for_child(variables, without=("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"))


def memory_bytes(model_dir: Path) -> int:
    """About how much memory a server of this folder takes on a CPU: its processes, vLLM's cache, and the weights."""
    weights = sum(path.stat().st_size for path in model_dir.glob("*.safetensors"))
    return PROCESSES_BYTES + int(float(current().vllm_cache_gib) * 2**30) + weights * 3 // 2
