"""KFP wrappers of `evaluate`, of the same measurement on the quantized model, and of the two gates."""

from kfp import dsl

from nvila.components.runner.image import IMAGE, QUANTIZE_IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate(
    step: str,
    slices: dsl.Input[dsl.Artifact],
    samples: dsl.Input[dsl.Dataset],
    base: dsl.Input[dsl.Model],
    train_1: dsl.Input[dsl.Model],
    train_2: dsl.Input[dsl.Model],
    train_3: dsl.Input[dsl.Model],
    train_4: dsl.Input[dsl.Model],
    train_5: dsl.Input[dsl.Model],
    out: dsl.Output[dsl.Metrics],
) -> None:
    """Measure the model after base and after each stage, beside question-only baselines."""
    from nvila.components.runner.execute import execute

    inputs = {
        "samples": samples.path,
        "base": base.path,
        "train-1": train_1.path,
        "train-2": train_2.path,
        "train-3": train_3.path,
        "train-4": train_4.path,
        "train-5": train_5.path,
    }
    out.metadata.update(execute(step, "nvila.components.evaluate.step", slices.path, inputs, out.path))


@dsl.component(base_image=QUANTIZE_IMAGE, install_kfp_package=False)
def evaluate_quantized(
    step: str,
    slices: dsl.Input[dsl.Artifact],
    model: dsl.Input[dsl.Model],
    metrics: dsl.Input[dsl.Metrics],
    samples: dsl.Input[dsl.Dataset],
    out: dsl.Output[dsl.Metrics],
) -> None:
    """Measure the quantized model on the same questions as the full one."""
    from nvila.components.runner.execute import execute

    inputs = {"model": model.path, "metrics": metrics.path, "samples": samples.path}
    out.metadata.update(execute(step, "nvila.components.evaluate.quantized", slices.path, inputs, out.path))


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def gate(
    step: str, slices: dsl.Input[dsl.Artifact], metrics: dsl.Input[dsl.Metrics], out: dsl.Output[dsl.Artifact]
) -> None:
    """Let the model pass, or end the run with exit code 3."""
    from nvila.components.runner.execute import execute

    inputs = {"metrics": metrics.path}
    out.metadata.update(execute(step, "nvila.components.evaluate.gate", slices.path, inputs, out.path))
