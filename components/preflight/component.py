"""KFP wrapper of the step `preflight`: looks at the machine before anything long starts."""

from kfp import dsl

from nvila.components.runner.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def preflight(step: str, slices: dsl.Input[dsl.Artifact], checks: dsl.Output[dsl.Artifact]) -> None:
    """Build demonstration data; check memory, disk, package versions, data files and the serving port."""
    from nvila.components.runner.execute import execute

    checks.metadata.update(execute(step, "nvila.components.preflight.step", slices.path, {}, checks.path))
