"""The pipeline `lifecycle`: from a recipe to a served model. Says what follows what; the steps hold the work."""

import copy
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import MappingProxyType
from typing import Any

from kfp import dsl
from kfp.dsl.base_component import BaseComponent
from kfp.dsl.graph_component import GraphComponent
from kfp.dsl.pipeline_task import PipelineTask
from kfp.dsl.python_component import PythonComponent

from nvila.components.contracts.recipe.rollout import TARGETS
from nvila.components.contracts.steps import STEPS, Step

Place = Callable[[PipelineTask, Step, Mapping[str, Any]], None]
"""Says where a task runs (resources, volumes, environment), given the task, its row, and the outputs of the first step,
which has worked it out; the first and the last step get none."""


def build(place: Place = lambda task, row, places: None, steps: Sequence[Step] = STEPS) -> GraphComponent:
    """The pipeline of a table of steps, the first of which makes the slices; `place` is called for every task."""
    first, *others = (row for row in steps if not row.at_exit)
    (last,) = (row for row in steps if row.at_exit)

    def add(row: Step, places: Mapping[str, Any] = MappingProxyType({}), **inputs: Any) -> PipelineTask:
        task = component(row)(step=row.name, **inputs).set_display_name(row.name)
        # One cache, the store's: KFP's key does not see our package's code.
        task.set_caching_options(enable_caching=False)
        place(task, row, places)
        return task

    def lifecycle(
        recipe: str = "tiny",
        data_uri: str = "",
        model_name: str = "",
        keep_ratio: float = 0.0,
        target: str = "none",
        overrides: str = "{}",
    ) -> None:
        """Validate, prune, train in stages, evaluate, quantize, register and roll out one NVILA.

        Args:
            recipe: micro, tiny, tiny-ablate, tiny-lr-ratio, tiny-spatial, nvila-15b, nvila-8b, nvila-8b-reference,
                nvila-8b-video, nvila-lite-2b or nvila-lite-8b; or the text of your own recipe: YAML, or JSON in one
                line, which is all that a field of the UI's form takes.
            data_uri: folder that holds one folder per source of the recipe; a relative one begins at the shared volume.
                Empty takes the recipe's own paths.
            model_name: name in the model registry; empty takes the recipe's.
            keep_ratio: share of the SFT data that pruning keeps, above 0 up to 1; 0 takes the recipe's.
            target: where to serve: TARGETS; empty takes the recipe's.
            overrides: JSON object laid over the recipe, such as {"evaluate": {"limit": 200}}.
        """
        with dsl.ExitHandler(add(last), name="run"):
            resolved = add(
                first,
                recipe=recipe,
                data_uri=data_uri,
                model_name=model_name,
                keep_ratio=keep_ratio,
                target=target,
                overrides=overrides,
            )
            tasks = {first.name: resolved}
            for row in others:
                inputs = {name: tasks[step].outputs["out"] for name, step in row.inputs.items()}
                tasks[row.name] = add(row, resolved.outputs, slices=resolved.outputs["out"], **inputs)
                tasks[row.name].after(*(tasks[step] for step in row.after))

    targets = ", ".join(f"{name} {target.about}" for name, target in TARGETS.items())
    lifecycle.__doc__ = (lifecycle.__doc__ or "").replace("TARGETS", targets)
    return dsl.pipeline(lifecycle, name="lifecycle", display_name="NVILA lifecycle")  # type: ignore[no-any-return]


def component(row: Step) -> BaseComponent:
    """The step's wrapper under the step's name, so that tasks are called `train-1`, `train-2` and not `train-2-3`."""
    wrapper = getattr(import_module(f"nvila.components.{row.folder}.component"), row.folder)
    spec = copy.deepcopy(wrapper.component_spec)
    spec.name = row.name
    return PythonComponent(spec, wrapper.python_func)
