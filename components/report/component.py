"""KFP wrapper of the step `report`, the exit task: it is written for rejected and failed runs too."""

from kfp import dsl

from nvila.components.runner.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def report(
    step: str, status: dsl.PipelineTaskFinalStatus, report: dsl.Output[dsl.HTML], summary: dsl.Output[dsl.Artifact]
) -> None:
    """Gather the run folder into one self-contained HTML page, then close the run: jobs, MLflow, webhook."""
    from functools import partial

    from nvila.components.report.close_run import close
    from nvila.components.runner.execute import execute

    last = partial(close, status.state, status.error_message)
    shown = {"report.html": report.path}
    summary.metadata.update(
        execute(step, "nvila.components.report.step", None, {}, summary.path, settings={}, shown=shown, at_end=last)
    )
