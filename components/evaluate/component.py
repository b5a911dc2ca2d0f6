"""KFP wrapper of the step `evaluate`: the model and those that it came from."""

from kfp import dsl

from nvila.components.runner.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate(
    step: str,
    slices: dsl.Input[dsl.Artifact],
    model: dsl.Input[dsl.Model],
    samples: dsl.Input[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Measure the model before training and after each stage, beside question-only baselines."""
    from nvila.components.runner.execute import execute

    inputs = {"model": model.path, "samples": samples.path}
    metrics.metadata.update(execute(step, "nvila.components.evaluate.step", slices.path, inputs, metrics.path))
