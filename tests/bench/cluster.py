"""What a cluster costs around the work: compiling for it, installing, and the container around a step."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from cluster_rows import contained, drawn, installed, launching, promoting

from nvila.components.contracts.pipelines import PIPELINES
from nvila.components.contracts.recipe.form import Form, fill_in
from nvila.components.contracts.recipe.reader import shipped
from nvila.pipelines.compile.package import SIZE_LIMIT_BYTES, compile_pipeline

COMPILE_SECONDS = 2.0
Row = tuple[str, str, float, float, str]


def rows() -> list[Row]:
    """Work, unit, baseline, ours, what the baseline is."""
    return [*_compiled(), *installed.rows(), *drawn.rows(), *contained.rows(), *launching.rows(), *promoting.rows()]


def _compiled() -> Iterator[Row]:
    """Every recipe goes through the same compiled pipeline: checked first, then compiled, as `nvila submit` does."""
    from kfp.compiler import Compiler

    from nvila.pipelines.build import build

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "out.yaml")
        began = time.monotonic()
        Compiler().compile(build(), str(file))
        plain = time.monotonic() - began
        for recipe in shipped():
            began = time.monotonic()
            fill_in(Form(recipe=recipe))
            compile_pipeline(file, "a:1", "b:1")
            what = "KFP's compiler without resources, environment and checks"
            yield f"check and compile {recipe}", "s", plain, time.monotonic() - began, what
        for pipeline in PIPELINES:
            began = time.monotonic()
            compile_pipeline(file, "a:1", "b:1", pipeline=pipeline)
            taken = time.monotonic() - began
            yield f"compile {pipeline}", "s", COMPILE_SECONDS, taken, "the most that is allowed"
        for form in ("pipeline", "manifests"):
            size = compile_pipeline(file, "a:1", "b:1", format=form) / 1024  # type: ignore[arg-type]
            yield f"compiled {form}", "KiB", SIZE_LIMIT_BYTES / 1024, size, "the most that is allowed"
