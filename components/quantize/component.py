"""KFP wrapper of the step `quantize`: one compressed-tensors checkpoint from the trained model."""

from kfp import dsl

from nvila.components.runner.image import QUANTIZE_IMAGE


@dsl.component(base_image=QUANTIZE_IMAGE, install_kfp_package=False)
def quantize(
    step: str,
    slices: dsl.Input[dsl.Artifact],
    model: dsl.Input[dsl.Model],
    samples: dsl.Input[dsl.Dataset],
    quantized: dsl.Output[dsl.Model],
) -> None:
    """Quantize the vision tower to W8A8 and the language model to W4A16."""
    from nvila.components.runner.execute import execute

    inputs = {"model": model.path, "samples": samples.path}
    quantized.metadata.update(execute(step, "nvila.components.quantize.step", slices.path, inputs, quantized.path))
