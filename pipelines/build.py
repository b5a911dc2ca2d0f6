"""Builds a pipeline of KFP from its table of steps. Says what follows what; the steps hold the work."""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import MappingProxyType
from typing import Any, get_origin

from kfp import dsl
from kfp.dsl.base_component import BaseComponent
from kfp.dsl.graph_component import GraphComponent
from kfp.dsl.pipeline_task import PipelineTask
from kfp.dsl.python_component import PythonComponent

from nvila.components.contracts.pipelines import PIPELINES, Pipeline
from nvila.components.contracts.recipe.form import Form, fill_in
from nvila.components.contracts.recipe.reader import shipped
from nvila.components.contracts.recipe.rollout import TARGETS
from nvila.components.contracts.steps import Step

Place = Callable[[PipelineTask, Step, Mapping[str, Any]], None]
"""Says where a task runs (resources, volumes, environment), given the task, its row, and the outputs of the first step,
which has worked it out; the first and the last step get none."""


def build(
    place: Place = lambda task, row, places: None,
    pipeline: Pipeline = PIPELINES["lifecycle"],
    steps: Sequence[Step] | None = None,
) -> GraphComponent:
    """The pipeline of a table of steps (its own, or `steps`), the first of which makes the slices; `place` is called
    for every task."""
    first, *others = (row for row in steps or pipeline.steps if not row.at_exit)
    (last,) = (row for row in steps or pipeline.steps if row.at_exit)

    def add(row: Step, places: Mapping[str, Any] = MappingProxyType({}), **inputs: Any) -> PipelineTask:
        task = component(row)(step=row.name, **inputs).set_display_name(f"{row.name}: {row.remark}")
        # One cache, the store's: KFP's key does not see our package's code.
        task.set_caching_options(enable_caching=False)
        place(task, row, places)
        return task

    def flow(*fields: Any) -> None:
        with dsl.ExitHandler(add(last), name="run"):
            resolved = add(first, **dict(zip(pipeline.form, fields, strict=True)))
            tasks, made = {first.name: resolved}, {row.name: row.output for row in (first, *others)}
            for row in others:
                inputs = {name: tasks[step].outputs[made[step]] for name, step in row.inputs.items()}
                tasks[row.name] = add(row, resolved.outputs, slices=resolved.outputs[first.output], **inputs)
                tasks[row.name].after(*(tasks[step] for step in row.after))

    # KFP reads the form from the function's signature and docstring.
    flow.__name__, flow.__doc__ = pipeline.name, _described(pipeline)
    flow.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=value,
                annotation=get_origin(kind := Form.model_fields[name].annotation) or kind,
            )
            for name, value in pipeline.form.items()
        ]
    )
    return dsl.pipeline(flow, name=pipeline.name, display_name=f"NVILA {pipeline.name}")  # type: ignore[no-any-return]


def _described(pipeline: Pipeline) -> str:
    """The docstring: what the pipeline does, and what each field of its form is for."""
    recipes = [name for name in shipped() if fill_in(Form(recipe=name)).pipeline.name == pipeline.name]
    targets = ", ".join(f"{name} {target.about}" for name, target in TARGETS.items())
    words = {"RECIPES": f"{', '.join(recipes[:-1])} or {recipes[-1]}", "TARGETS": targets}
    lines = []
    for name in pipeline.form:
        text = " ".join((Form.model_fields[name].description or "").split())
        for word, says in words.items():
            text = text.replace(word, says)
        lines.append(f"    {name}: {text}")
    return "\n".join([pipeline.about, "", "Args:", *lines])


def component(row: Step) -> BaseComponent:
    """The step's wrapper under the step's name, so that tasks are called `train-1`, `train-2` and not `train-2-3`."""
    wrapper = getattr(import_module(f"nvila.components.{row.folder}.component"), row.folder)
    spec = copy.deepcopy(wrapper.component_spec)
    spec.name = row.name
    return PythonComponent(spec, wrapper.python_func)
