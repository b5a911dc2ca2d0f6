"""KFP wrapper of the step `resolve`: pipeline parameters in, every step's slice out."""

from kfp import dsl

from nvila.components.runner.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def resolve(
    step: str,
    recipe: str,
    data_uri: str,
    model_name: str,
    keep_ratio: float,
    target: str,
    overrides: str,
    out: dsl.Output[dsl.Artifact],
) -> None:
    """Merge the form's fields into the recipe, check it, and write each step's slice."""
    from nvila.components.runner.execute import execute

    form = {
        "recipe": recipe,
        "data_uri": data_uri,
        "model_name": model_name,
        "keep_ratio": keep_ratio,
        "target": target,
        "overrides": overrides,
    }
    out.metadata.update(execute(step, "nvila.components.resolve.step", None, {}, out.path, settings=form))
