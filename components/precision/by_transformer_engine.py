"""FP8 products by Transformer Engine: its Linears over the model's parameters, its autocast, its checkpointing.

Written against the release in requirements/transformer-engine.lock, by whose signatures a test holds every call of it
(tests/golden/te-signatures.json). It has never run: see docs/fp8.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.recipe.train import Run
from nvila.components.contracts.results.model import Fp8Products

AMAX_HISTORY = 1024
"""Passes whose largest values `fp8-delayed` takes its scale from."""
BUFFERS = ("scale", "amax_history")
"""What delayed scaling keeps from one pass to the next, for each of its two ways."""
WAYS = ("fwd", "bwd")


@dataclass
class Passes:
    """Where a step's passes through the model are."""

    first: bool | None = None
    """Whether weights are cast again; None: in every pass, since nothing is kept of them."""


def use(
    model: Any, linears: Mapping[str, Any], run: Run, names: dict[str, int]
) -> tuple[Fp8Products, Callable[[bool], AbstractContextManager[None]]]:
    """Put Transformer Engine's Linear in the place of these, with the same parameters.

    The processes of a group exist already, since they choose delayed scales together.

    Returns:
        What was done, for the manifest, and what a forward pass is in: told whether the weights have changed since the
        pass before. Until they do, their FP8 copies stay; not under ZeRO 3, which would have shared them out in vain.

    Raises:
        ConfigError: this GPU, or its CUDA, cannot do it.
    """
    import torch
    import transformer_engine.pytorch as te

    _require(run)
    passes, recipe = Passes(), _recipe(run)
    kind = _stateful(passes, recipe) if run.precision == "fp8-delayed" else _stateless(passes)
    for name, linear in linears.items():
        model.set_submodule(name, kind.over(linear).train(linear.training))
    group = torch.distributed.group.WORLD

    @contextmanager
    def forward(first: bool) -> Iterator[None]:
        passes.first = None if run.zero == 3 else first
        with te.autocast(enabled=True, recipe=recipe, amax_reduction_group=group):
            yield

    scaling = {"fp8-current": "tensorwise", "fp8-delayed": "delayed", "fp8-block": "block"}[run.precision]
    told = Fp8Products(
        backend="transformer-engine", version=version("transformer-engine"), scaling=scaling, linears=names
    )
    return told, forward


def checkpoint(decoder: Any) -> None:
    """Have a decoder of transformers compute its blocks again by Transformer Engine's checkpointing: by torch's own it
    would without the scales of the first time."""
    import transformer_engine.pytorch as te

    again = partial(te.checkpoint, use_reentrant=False)
    decoder._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=again)


def _require(run: Run) -> None:
    """Refuse what the library cannot do here.

    Raises:
        ConfigError: with its own reason.
    """
    import transformer_engine.pytorch as te

    if run.precision == "fp8-block":
        able, why = te.is_fp8_block_scaling_available(return_reason=True)
    else:
        able, why = te.is_fp8_available(return_reason=True)
    if not able:
        raise ConfigError(f"Transformer Engine cannot do {run.precision} here: {why}", where="train.precision")


def _recipe(run: Run) -> Any:
    """E4M3 in the forward pass and E5M2 for gradients, as in the reference; by block E4M3 for all."""
    from transformer_engine.common.recipe import DelayedScaling, Float8BlockScaling, Float8CurrentScaling, Format

    if run.precision == "fp8-delayed":
        return DelayedScaling(
            fp8_format=Format.HYBRID, amax_history_len=AMAX_HISTORY, amax_compute_algo="max", reduce_amax=True
        )
    if run.precision == "fp8-block":
        return Float8BlockScaling(fp8_format=Format.E4M3)
    return Float8CurrentScaling(fp8_format=Format.HYBRID)


def _stateless(passes: Passes) -> Any:
    """A Linear that knows where a step is, and has nothing to keep."""
    import torch
    import transformer_engine.pytorch as te

    class Linear(te.Linear):  # type: ignore[misc]
        get_extra_state = torch.nn.Module.get_extra_state
        set_extra_state = torch.nn.Module.set_extra_state

        @classmethod
        def over(cls, linear: torch.nn.Linear) -> Any:
            """One with the parameters of `linear`; its own weights are never made, not even for a moment."""
            made = cls(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                params_dtype=linear.weight.dtype,
                device="meta",
            )
            made.weight = linear.weight
            if linear.bias is not None:
                made.bias = linear.bias
            return made

        def forward(self, inp: torch.Tensor) -> torch.Tensor:
            return super().forward(inp, is_first_microbatch=passes.first)  # type: ignore[no-any-return]

    return Linear


def _stateful(passes: Passes, recipe: Any) -> Any:
    """One whose scales and largest values go into the training checkpoint, as tensors.

    Transformer Engine would pickle them with its recipe, and unpickle what it finds once
    `NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE` allows that. It stays forbidden: tensors are all that there is to bring back.
    """
    import torch

    class Linear(_stateless(passes)):  # type: ignore[misc]
        @classmethod
        def over(cls, linear: torch.nn.Linear) -> Any:
            made = super().over(linear)
            made.register_load_state_dict_pre_hook(_may_be_missing)
            return made

        def get_extra_state(self) -> dict[str, torch.Tensor]:
            """By buffer and way; nothing before the first pass."""
            return {
                f"{buffer}_{way}": getattr(self.fp8_meta[f"scaling_{way}"], buffer)
                for way in WAYS
                if f"scaling_{way}" in self.fp8_meta
                for buffer in BUFFERS
            }

        def set_extra_state(self, state: Mapping[str, torch.Tensor]) -> None:
            """Bring them back."""
            if not state:
                return
            self.fp8_meta |= {"recipe": recipe, "num_gemms": 1}
            self.init_fp8_meta_tensors(recipe)
            for way in WAYS:
                for buffer in BUFFERS:
                    getattr(self.fp8_meta[f"scaling_{way}"], buffer).copy_(state[f"{buffer}_{way}"])

    return Linear


def _may_be_missing(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Weights without scales are loaded all the same: those begin anew."""
    state.setdefault(f"{prefix}_extra_state", {})
