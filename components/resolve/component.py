"""KFP wrapper of the step `resolve`: pipeline parameters in, every step's slice out."""

from typing import NamedTuple

from kfp import dsl

from nvila.components.runner.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def resolve(
    step: str,
    recipe: str,
    data_uri: str,
    model_name: str,
    target: str,
    overrides: dict,
    slices: dsl.Output[dsl.Artifact],
    start_from: str = "",
    keep_ratio: float = 0.0,
) -> NamedTuple(  # type: ignore[valid-type]
    "Places",
    [("gpu_resource", str), ("plain_tolerations", list), ("plain_node_labels", dict)]
    + [(f"{size}_{part}", str) for size in ("cpus", "memory") for part in ("cpu", "memory")]
    + [
        (f"{size}_{part}", kind)
        for size in ("gpus_job", "node_job", "gpu_job", "gpu")
        for part, kind in (("cpu", str), ("memory", str), ("gpus", str), ("tolerations", list), ("node_labels", dict))
    ],
):
    """Merge the form's fields into the recipe, check it, write the steps' slices, and say where their pods go."""
    from nvila.components.contracts.environment import Environment
    from nvila.components.resolve.places import places
    from nvila.components.runner.execute import execute

    form = {
        "recipe": recipe,
        "start_from": start_from,
        "data_uri": data_uri,
        "model_name": model_name,
        "keep_ratio": keep_ratio,
        "target": target,
        "overrides": overrides,
    }
    slices.metadata.update(execute(step, "nvila.components.resolve.step", None, {}, slices.path, settings=form))
    return places(slices.path, Environment.read())
