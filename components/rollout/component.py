"""KFP wrapper of the step `rollout`: the registered version becomes the served one, or does not."""

from kfp import dsl

from nvila.components.runner.image import QUANTIZE_IMAGE


@dsl.component(base_image=QUANTIZE_IMAGE, install_kfp_package=False)
def rollout(
    step: str,
    slices: dsl.Input[dsl.Artifact],
    version: dsl.Input[dsl.Artifact],
    model: dsl.Input[dsl.Model],
    metrics: dsl.Input[dsl.Metrics],
    samples: dsl.Input[dsl.Dataset],
    promotion: dsl.Output[dsl.Artifact],
) -> None:
    """Serve the version, probe it, and move the alias `champion`."""
    from nvila.components.runner.execute import execute

    inputs = {"version": version.path, "model": model.path, "metrics": metrics.path, "samples": samples.path}
    promotion.metadata.update(execute(step, "nvila.components.rollout.step", slices.path, inputs, promotion.path))
