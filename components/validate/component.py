"""KFP wrapper of the step `validate`: the user's files in, the table of good samples out."""

from kfp import dsl

from nvila.components.runner.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def validate(
    step: str, slices: dsl.Input[dsl.Artifact], samples: dsl.Output[dsl.Dataset], data_docs: dsl.Output[dsl.HTML]
) -> None:
    """Check every record of every source; write the sample table, the quarantine and the data docs."""
    from nvila.components.runner.execute import execute

    shown = {"data_docs.html": data_docs.path}
    samples.metadata.update(execute(step, "nvila.components.validate.step", slices.path, {}, samples.path, shown=shown))
