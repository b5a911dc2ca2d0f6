"""KFP wrapper of the steps `gate` and `gate-quantized`."""

from kfp import dsl

from nvila.components.runner.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def gate(
    step: str, slices: dsl.Input[dsl.Artifact], metrics: dsl.Input[dsl.Metrics], passed: dsl.Output[dsl.Artifact]
) -> None:
    """Let the model pass, or end the run with exit code 3."""
    from nvila.components.runner.execute import execute

    inputs = {"metrics": metrics.path}
    passed.metadata.update(execute(step, "nvila.components.gate.step", slices.path, inputs, passed.path))
