"""The pipeline `lifecycle`: from a recipe to a served model. Says what follows what; the steps hold the work."""

import copy
from collections.abc import Callable
from typing import Any

from kfp import dsl
from kfp.dsl.base_component import BaseComponent
from kfp.dsl.graph_component import GraphComponent
from kfp.dsl.pipeline_task import PipelineTask
from kfp.dsl.python_component import PythonComponent

from nvila.components.base.component import base
from nvila.components.evaluate.component import evaluate, evaluate_quantized, gate
from nvila.components.preflight.component import preflight
from nvila.components.prune.component import prune
from nvila.components.quantize.component import quantize
from nvila.components.register.component import register
from nvila.components.report.component import report
from nvila.components.resolve.component import resolve
from nvila.components.rollout.component import rollout
from nvila.components.train.component import train
from nvila.components.validate.component import validate

Place = Callable[[PipelineTask, str], None]
"""Says where a task runs (resources, volumes, environment), given the task and the step's name."""


def build(place: Place = lambda task, step: None) -> GraphComponent:
    """The pipeline; `place` is called for every task."""

    def add(component: BaseComponent, step: str, **inputs: Any) -> PipelineTask:
        task = _named(component, step)(step=step, **inputs).set_display_name(step)
        # One cache, the store's: KFP's key does not see our package's code.
        task.set_caching_options(enable_caching=False)
        place(task, step)
        return task

    @dsl.pipeline(name="lifecycle", display_name="NVILA lifecycle")
    def lifecycle(
        recipe: str = "tiny",
        data_uri: str = "",
        model_name: str = "",
        keep_ratio: float = 0.0,
        target: str = "none",
        overrides: str = "{}",
    ) -> None:
        """Validate, prune, train in five stages, evaluate, quantize, register and roll out one NVILA.

        Args:
            recipe: micro, tiny, nvila-15b, nvila-8b, nvila-8b-reference, nvila-8b-video, nvila-lite-2b or
                nvila-lite-8b; or the text of your own recipe: YAML, or JSON in one line, which is all that a field of
                the UI's form takes.
            data_uri: folder that holds one folder per source of the recipe; a relative one begins at the shared volume.
                Empty takes the recipe's own paths.
            model_name: name in the model registry; empty takes the recipe's.
            keep_ratio: share of the SFT data that pruning keeps, above 0 up to 1; 0 takes the recipe's.
            target: where to serve: none registers the model only, local starts a server beside the run (not on a
                cluster); empty takes the recipe's.
            overrides: JSON object laid over the recipe, such as {"evaluate": {"limit": 200}}.
        """
        with dsl.ExitHandler(add(report, "report"), name="run"):
            resolved = add(
                resolve,
                "resolve",
                recipe=recipe,
                data_uri=data_uri,
                model_name=model_name,
                keep_ratio=keep_ratio,
                target=target,
                overrides=overrides,
            )
            _steps(add, resolved.outputs["out"])

    return lifecycle


def _steps(add: Callable[..., PipelineTask], slices: Any) -> None:
    """Everything after `resolve`; each step reads its own slice."""

    def step(component: BaseComponent, name: str, **inputs: PipelineTask) -> PipelineTask:
        return add(component, name, slices=slices, **{key: task.outputs["out"] for key, task in inputs.items()})

    checked = step(preflight, "preflight")
    samples = step(validate, "validate").after(checked)
    start = step(base, "base", samples=samples)
    image = step(prune, "prune-image", samples=samples, base=start)
    video = step(prune, "prune-video", samples=samples, base=start)

    first = step(train, "train-1", model=start, samples=samples)
    second = step(train, "train-2", model=first, samples=samples)
    third = step(train, "train-3", model=second, samples=samples)
    fourth = step(train, "train-4", model=third, samples=samples, kept_image=image)
    fifth = step(train, "train-5", model=fourth, samples=samples, kept_image=image, kept_video=video)

    stages = {"train_1": first, "train_2": second, "train_3": third, "train_4": fourth, "train_5": fifth}
    full = step(evaluate, "evaluate", samples=samples, base=start, **stages)
    passed = step(gate, "gate", metrics=full)

    small = step(quantize, "quantize", model=fifth, samples=samples).after(passed)
    metrics = step(evaluate_quantized, "evaluate-quantized", model=small, metrics=full, samples=samples)
    good = step(gate, "gate-quantized", metrics=metrics)
    version = step(register, "register", model=small, metrics=metrics, full=full, samples=samples, gate=good)
    step(rollout, "rollout", version=version, model=small, metrics=metrics, samples=samples)


def _named(component: BaseComponent, step: str) -> BaseComponent:
    """The component under the step's name, so that tasks are called `train-1` to `train-5` and not `train-2-3`."""
    spec = copy.deepcopy(component.component_spec)
    spec.name = step
    return PythonComponent(spec, component.python_func)
