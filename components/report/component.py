"""KFP wrapper of the step `report`, the exit task: it is written for rejected and failed runs too."""

from kfp import dsl

from nvila.components.runner.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def report(
    step: str, status: dsl.PipelineTaskFinalStatus, report: dsl.Output[dsl.HTML], summary: dsl.Output[dsl.Artifact]
) -> None:
    """Gather the run folder into one self-contained HTML page, then close the run: jobs, MLflow, webhook."""
    from functools import partial

    from nvila.components.contracts.manifest import Manifest
    from nvila.components.contracts.results.run import Ending
    from nvila.components.report.close_run import close
    from nvila.components.runner.execute import execute

    last = partial(close, status.state, status.error_message)
    said = {"state": status.state or "", "message": status.error_message}
    shown = {"report.html": report.path}
    summary.metadata.update(
        execute(step, "nvila.components.report.step", None, {}, summary.path, settings=said, shown=shown, at_end=last)
    )
    # The UI shows an artifact's metadata; KFP itself has lost the exit code.
    ended = Manifest.load(summary.path).told(Ending).model_dump(mode="json", exclude_none=True)
    summary.metadata.update({f"run_{name}": value for name, value in ended.items()})
