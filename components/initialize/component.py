"""KFP wrapper of the step `initialize`: the model that stage 1 starts from."""

from kfp import dsl

from nvila.components.runner.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def initialize(
    step: str, slices: dsl.Input[dsl.Artifact], samples: dsl.Input[dsl.Dataset], model: dsl.Output[dsl.Model]
) -> None:
    """Fetch published weights, or make a small tower, decoder and tokenizer."""
    from nvila.components.runner.execute import execute

    inputs = {"samples": samples.path}
    model.metadata.update(execute(step, "nvila.components.initialize.step", slices.path, inputs, model.path))
