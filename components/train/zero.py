"""DeepSpeed's ZeRO: what it is told, how its optimizers divide gradients, and weights that no process holds whole.

Under ZeRO 3 a tensor goes from the checkpoint to the processes' shares, and back, before the next one does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from nvila.components.contracts.precisions import PRECISIONS
from nvila.components.contracts.recipe.train import Run

if TYPE_CHECKING:
    import torch

    from nvila.components.model.checkpoint.tensorfile import Later
    from nvila.components.model.checkpoint.weights import Receive

_MMAP_THRESHOLD = -3
"""`M_MMAP_THRESHOLD` of malloc.h. Once it is set, glibc no longer raises it to the size of what was freed."""
MAPPED_BYTES = 4 * 2**20
"""Tensors of this size and larger have pages of their own."""
GATHERED_SHARE, MOST_GATHERED = 4, 10**9
BUCKET_SHARE, MOST_REDUCED = 8, 5 * 10**8
"""Shares of a model's weights, and the most, which are DeepSpeed's own numbers."""


def gathered(weights: int) -> int:
    """Of a model's weights those that may be whole at one time under ZeRO 3."""
    return max(1, min(MOST_GATHERED, weights // GATHERED_SHARE))


def reduced(run: Run, weights: int) -> int:
    """Of the gradients of a model's weights those that are reduced at one time: DeepSpeed copies them into a buffer."""
    if run.zero == 2 and run.offload == "cpu" and PRECISIONS[run.precision].weights == "float32":
        # Of several passes whose gradients take several buckets DeepSpeed 0.19 makes wrong weights there (matrix.py).
        return max(1, weights)
    return max(1, min(MOST_REDUCED, weights // BUCKET_SHARE))


def zero_settings(run: Run, weights: int) -> dict[str, Any]:
    """Entries of DeepSpeed's configuration that say what processes share out of so many weights, and where it lies."""
    zero: dict[str, Any] = {"stage": run.zero, "reduce_bucket_size": reduced(run, weights)}
    if run.zero == 3:
        live = gathered(weights)
        zero |= {"stage3_max_live_parameters": live, "stage3_max_reuse_distance": live}
    if run.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
        if run.zero == 3:
            zero["offload_param"] = {"device": "cpu"}
    settings = {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW, so that offloading changes no result
    }
    if run.zero:
        # Sums of many gradients in bfloat16 would lose those of single micro batches.
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def divide_by(optimizer: Any, divisor: float) -> None:
    """Have the next step of a DeepSpeed optimizer divide its gradients, before they are clipped."""
    if hasattr(type(optimizer), "loss_scale"):
        optimizer.loss_scale = divisor
        return
    # That of ZeRO 1 with bfloat16 weights has no loss scale: its sums are divided where they lie.
    if divisor != 1.0:
        for gradients in optimizer.fp32_groups_gradients_flat:
            gradients.div_(divisor)


def finite(tensor: torch.Tensor) -> bool:
    """Whether all of a tensor is finite, read once and nothing written: training waits for it at each checkpoint."""
    import torch

    # Where one is NaN, both ends are.
    return tensor.numel() == 0 or bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all())


def size(parameter: torch.nn.Parameter) -> int:
    """Weights of a parameter, wherever they lie."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """Shape of a parameter, wherever its weights lie."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def give_back_what_is_freed() -> None:
    """Have glibc give freed tensors back to the machine: what ZeRO 3 gathers and drops would stay with the process."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_MMAP_THRESHOLD, MAPPED_BYTES)


def receiver(config: dict[str, Any]) -> Receive:
    """Has rank 0 read each tensor of a model and every process keep its share; all must load the same model.

    `config` is what DeepSpeed is told; the process group must be there.
    """
    import deepspeed
    import torch

    if not torch.cuda.is_available():
        give_back_what_is_freed()
    shared: list[Any] = []

    def receive(_: str, tensor: torch.Tensor, read: Any) -> None:
        if deepspeed.comm.get_rank() == 0:
            read()
        if shared:
            shared[0].convert_to_zero_parameters(param_list=[tensor])
            return
        first = torch.nn.Module()
        first.register_parameter("first", tensor)  # type: ignore[arg-type]
        deepspeed.zero.Init(module=first, config_dict_or_path=config)
        shared.append(tensor)

    return receive


@contextmanager
def gathered_here(module: torch.nn.Module) -> Iterator[None]:
    """A module's parameters whole in every process, where these share them; no larger module than memory holds."""
    import deepspeed

    shared = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(shared, enabled=bool(shared)):
        yield


@contextmanager
def whole(model: torch.nn.Module, rank: int) -> Iterator[dict[str, Later]]:
    """The parameters by name of a model that processes share, for rank 0, which has one whole while it looks at it.

    Every process must enter; the others get none, and lend their shares until rank 0 leaves.
    """
    import deepspeed
    import torch

    from nvila.components.model.checkpoint.tensorfile import Later

    named = dict(model.named_parameters())

    def asked(name: str | None) -> str | None:
        said = [name]
        torch.distributed.broadcast_object_list(said, 0)
        return said[0]

    def gather(name: str) -> torch.Tensor:
        with deepspeed.zero.GatheredParameters([named[name]]):
            return named[name].detach().cpu() if rank == 0 else torch.empty(0)

    def ask(name: str) -> torch.Tensor:
        asked(name)
        return gather(name)

    if rank == 0:
        yield {name: Later(shape(one), one.dtype, partial(ask, name)) for name, one in named.items()}
        asked(None)
        return
    while name := asked(None):
        gather(name)
    yield {}
