"""KFP wrapper of the step `prune`, used once for the image sources and once for the video sources."""

from kfp import dsl

from nvila.components.runner.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def prune(
    step: str,
    slices: dsl.Input[dsl.Artifact],
    samples: dsl.Input[dsl.Dataset],
    model: dsl.Input[dsl.Model],
    kept: dsl.Output[dsl.Dataset],
) -> None:
    """Score SFT samples by the recipe's method; write the scores and which samples stay."""
    from nvila.components.runner.execute import execute

    inputs = {"samples": samples.path, "model": model.path}
    kept.metadata.update(execute(step, "nvila.components.prune.step", slices.path, inputs, kept.path))
