"""`nvila infer`: one question to a model loaded in this process, without a server."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nvila.pipelines.models import find_model


def infer(
    reference: str, question: str, images: Sequence[Path], videos: Sequence[Path], max_new_tokens: int, runs: Path
) -> str:
    """The model's answer; pictures come before clips, each in the order given.

    Raises:
        ConfigError: no such model.
        DataError: a picture or clip cannot be read.
    """
    model = find_model(reference, runs.absolute())
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when it is imported

    from nvila.components.data.media import load_image, load_video_frames
    from nvila.components.model.conversation import Turn
    from nvila.components.model.loading import load
    from nvila.components.model.prompt import make_prompt

    loaded, tokenizer = load(model.folder)
    media: list[Any] = [load_image(path) for path in images]
    media += [load_video_frames(path, loaded.config.num_video_frames) for path in videos]
    prompt = make_prompt([Turn("human", question)], media, loaded.config)
    return loaded.generate(tokenizer, [prompt], max_new_tokens)[0]
