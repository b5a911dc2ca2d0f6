"""KFP wrapper of the step `register`: a version in the model registry."""

from kfp import dsl

from nvila.components.runner.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def register(
    step: str,
    slices: dsl.Input[dsl.Artifact],
    model: dsl.Input[dsl.Model],
    metrics: dsl.Input[dsl.Metrics],
    full: dsl.Input[dsl.Metrics],
    samples: dsl.Input[dsl.Dataset],
    gate: dsl.Input[dsl.Artifact],
    card: dsl.Output[dsl.Markdown],
    version: dsl.Output[dsl.Artifact],
) -> None:
    """Register the quantized model with its metrics, card, lineage and pinned prompts."""
    from nvila.components.runner.execute import execute

    inputs = {
        "model": model.path,
        "metrics": metrics.path,
        "full": full.path,
        "samples": samples.path,
        "gate": gate.path,
    }
    shown = {"model_card.md": card.path}
    version.metadata.update(
        execute(step, "nvila.components.register.step", slices.path, inputs, version.path, shown=shown)
    )
