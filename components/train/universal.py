"""Makes a checkpoint fit another number of processes, or another ZeRO stage from 1 on, than those that wrote it.

DeepSpeed divides the files of ZeRO among the processes. Its converter makes files of single tensors of them, of which
every process can then load its share.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

from nvila.components.contracts.errors import TrainingError
from nvila.components.contracts.files import discard, read_json
from nvila.components.contracts.text import say
from nvila.components.train.checkpoints import ABOUT, UNIVERSAL, plainly_named
from nvila.components.train.engine import Engine


@contextmanager
def fitting(engine: Engine, checkpoint: Path, zero: int) -> Iterator[Path]:
    """The checkpoint as these processes can load it: itself, or one made of it that is removed in the end.

    Raises:
        TrainingError: only one of both is of ZeRO.
    """
    about = engine.gather([read_json(checkpoint / ABOUT) if engine.rank == 0 else {}])[0]
    world, before = about.get("world", engine.world), about.get("zero", zero)
    if (world, before) == (engine.world, zero) or zero == before == 0:
        yield checkpoint
        return
    if 0 in (zero, before):
        raise TrainingError(
            f"a checkpoint of ZeRO {before} cannot be gone on from with ZeRO {zero}",
            where=str(checkpoint),
            do=f"Set train.zero to {before}, or remove the folder: the stage then begins anew",
        )
    made = checkpoint.parent / UNIVERSAL / checkpoint.name
    if engine.rank == 0:
        say(f"{checkpoint.name} was written by {world} processes with ZeRO {before}: made anew for {engine.world}")
        convert(checkpoint, made)
    engine.total(0)  # the others load what the first has made
    engine.deepspeed._config.load_universal_checkpoint = True
    try:
        yield made
    finally:
        engine.deepspeed._config.load_universal_checkpoint = False
    engine.total(0)
    if engine.rank == 0:
        discard(made.parent)


def convert(checkpoint: Path, made: Path) -> None:
    """Make the universal form of a checkpoint, which is as large; in memory lies one of its files at a time."""
    from deepspeed.checkpoint.ds_to_universal import main

    discard(made.parent)
    made.mkdir(parents=True)
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    with ExitStack() as stack:
        source = stack.enter_context(plainly_named(checkpoint))
        target = stack.enter_context(plainly_named(made.parent))
        stack.enter_context(redirect_stdout(StringIO()))
        stack.enter_context(redirect_stderr(StringIO()))
        folders = {"input_folder": source, "output_folder": f"{target}/{made.name}"}
        main(Namespace(**folders, **options, inject_missing_state=True))
