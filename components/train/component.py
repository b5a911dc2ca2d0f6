"""KFP wrapper of the step `train`, used once for each stage."""

from typing import Optional

from kfp import dsl

from nvila.components.runner.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def train(
    step: str,
    slices: dsl.Input[dsl.Artifact],
    model: dsl.Input[dsl.Model],
    samples: dsl.Input[dsl.Dataset],
    trained: dsl.Output[dsl.Model],
    kept_image: Optional[dsl.Input[dsl.Dataset]] = None,  # noqa: UP045 - KFP reads the annotation's text
    kept_video: Optional[dsl.Input[dsl.Dataset]] = None,  # noqa: UP045
) -> None:
    """Train one stage from the model of the stage before."""
    from nvila.components.runner.execute import execute

    given = {"model": model, "samples": samples, "kept_image": kept_image, "kept_video": kept_video}
    inputs = {name: artifact.path for name, artifact in given.items() if artifact}
    trained.metadata.update(execute(step, "nvila.components.train.step", slices.path, inputs, trained.path))
