"""Gives a model's large Linears products in FP8, and tells the engine what that asks of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.linears import decoder_linears, fp8_linears, no_fp8
from nvila.components.contracts.precisions import PRECISIONS
from nvila.components.contracts.recipe.train import Run
from nvila.components.contracts.results.model import Fp8Products
from nvila.components.precision.backends import backend
from nvila.components.precision.linears import compactly, eligible

if TYPE_CHECKING:
    from torch import nn


def _plain(first: bool) -> AbstractContextManager[Any]:
    return nullcontext()


@dataclass(frozen=True)
class Products:
    """The FP8 products of a model."""

    told: Fp8Products
    """For the manifest."""
    forward: Callable[[bool], AbstractContextManager[Any]] = _plain
    """What a forward pass is in; it is told whether the weights have changed since the one before."""
    meets: bool = False
    """Whether processes meet in each pass, so that all must have as many of them."""


def require(llm: Mapping[str, Any], run: Run) -> None:
    """Refuse a run in an FP8 precision that would take no Linear of a decoder of this configuration.

    Raises:
        ConfigError: it would not.
    """
    linears, least = linears_of(llm), run.fp8.min_features
    if PRECISIONS[run.precision].fp8 and not fp8_linears(linears, least):
        raise ConfigError(no_fp8(linears.values(), least), where="train.fp8.min_features", value=least)


def linears_of(llm: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """`decoder_linears` of a decoder's configuration."""
    return decoder_linears(
        int(llm["hidden_size"]),
        int(llm["num_attention_heads"]),
        int(llm["num_key_value_heads"]),
        int(llm["intermediate_size"]),
        int(llm.get("head_dim") or 0) or None,
    )


def use(model: Any, run: Run) -> Products | None:
    """Have a model's eligible Linears multiply in FP8, its adapters in place; None where the precision has no FP8.

    Parameters stay what they are, and under their names, also where ZeRO 3 has shared them out.

    Raises:
        ConfigError: no Linear is eligible, or this machine cannot do it.
    """
    if not PRECISIONS[run.precision].fp8:
        return None
    linears = eligible(model, run.fp8.min_features)
    if not linears:
        raise ConfigError(
            "no Linear of the decoder is left that FP8 could take",
            where="train.precision",
            value=run.precision,
            do="Say bf16",
        )
    products = multiply(model, linears, run)
    if products.told.backend == "transformer-engine" and model.llm.is_gradient_checkpointing:
        from nvila.components.precision import by_transformer_engine

        by_transformer_engine.checkpoint(model.llm)
    return products


def multiply(model: nn.Module, linears: Mapping[str, nn.Linear], run: Run) -> Products:
    """Have these Linears of a model, by their names, multiply in FP8 on this machine.

    Raises:
        ConfigError: it cannot.
    """
    names = compactly(linears)
    if backend(run) == "torchao":
        from nvila.components.precision import by_torchao

        return Products(by_torchao.use(model, linears, run, names))
    from nvila.components.precision import by_transformer_engine

    told, forward = by_transformer_engine.use(model, linears, run, names)
    return Products(told, forward, meets=run.precision == "fp8-delayed")
