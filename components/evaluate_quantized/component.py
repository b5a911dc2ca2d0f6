"""KFP wrapper of the step `evaluate-quantized`: the same measurement on the quantized model."""

from kfp import dsl

from nvila.components.runner.image import QUANTIZE_IMAGE


@dsl.component(base_image=QUANTIZE_IMAGE, install_kfp_package=False)
def evaluate_quantized(
    step: str,
    slices: dsl.Input[dsl.Artifact],
    model: dsl.Input[dsl.Model],
    metrics: dsl.Input[dsl.Metrics],
    samples: dsl.Input[dsl.Dataset],
    quantized_metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Measure the quantized model on the same questions as the full one."""
    from nvila.components.runner.execute import execute

    inputs = {"model": model.path, "metrics": metrics.path, "samples": samples.path}
    quantized_metrics.metadata.update(
        execute(step, "nvila.components.evaluate_quantized.step", slices.path, inputs, quantized_metrics.path)
    )
