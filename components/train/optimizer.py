"""AdamW of a stage: a learning rate for each part, and which weights decay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nvila.components.contracts.recipe.train import Stage

if TYPE_CHECKING:
    import torch

BETAS = (0.9, 0.999)
EPSILON = 1e-8


def adamw(model: torch.nn.Module, stage: Stage) -> torch.optim.AdamW:
    """AdamW over the parameters of `model` that require gradients; fused, since torch's default makes temporaries as
    large as a flat tensor of ZeRO, several times a step."""
    import torch

    groups = parameter_groups(model, stage)
    return torch.optim.AdamW(groups, lr=stage.learning_rate, betas=BETAS, eps=EPSILON, fused=True)


def parameter_groups(model: torch.nn.Module, stage: Stage) -> list[dict[str, Any]]:
    """What has one learning rate and one decay, the stage's own rate first; parts of one rate share their groups.

    As in the reference, weights of norms and biases do not decay; all else does, embeddings too. Nor do DoRA's
    magnitudes: they begin as the lengths of trained weights, where LoRA's matrices begin at no change.
    """
    kept = _undecayed(model)
    found: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for rate in dict.fromkeys([stage.learning_rate, *map(stage.rate, stage.trainable)]):
        for decay in dict.fromkeys([stage.weight_decay, 0.0]):
            found[rate, decay] = []
    for part in (name for name, _ in model.named_children() if name in stage.trainable):
        for parameter in getattr(model, part).parameters():
            if parameter.requires_grad:
                decay = 0.0 if id(parameter) in kept else stage.weight_decay
                found[stage.rate(part), decay].append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in found.items()
        if parameters
    ]


def _undecayed(model: torch.nn.Module) -> set[int]:
    """Identities of the weights of norms, which DoRA's magnitudes are like, and of all biases."""
    found = set()
    for module in model.modules():
        is_norm = type(module).__name__.endswith(("LayerNorm", "RMSNorm", "DoraLinearLayer"))
        for name, parameter in module.named_parameters(recurse=False):
            if is_norm or "bias" in name:
                found.add(id(parameter))
    return found
