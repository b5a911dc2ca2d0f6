"""Run by the serving Python: token ids that vLLM makes of chat requests, and our batch worker of the same questions."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(folder: Path) -> None:
    """Read `cases.json` of each model folder in `folder`, write `seen.json` beside it."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.renderers import ChatParams
    from vllm.renderers.hf import HfRenderer, resolve_chat_template_content_format
    from vllm.tokenizers import get_tokenizer

    from nvila.components.model.config.config import ModelConfig
    from nvila.components.model.text.conversation import Turn
    from nvila.components.model.text.tokenizer import load_tokenizer
    from nvila.components.serve.batch_process import _prompt
    from nvila.components.serve.plugin import register

    register()
    for model in sorted(path.parent for path in folder.glob("*/cases.json")):
        args = EngineArgs(model=str(model), dtype="float32", skip_mm_profiling=True, enforce_eager=True)
        engine = args.create_engine_config()
        renderer = HfRenderer(engine, get_tokenizer(str(model)))
        config = ModelConfig.from_json(json.loads((model / "config.json").read_text())["nvila"])
        sampling = {"video": config.sampling.to_options()}
        chat = ChatParams(chat_template_kwargs={"add_generation_prompt": True}, media_io_kwargs=sampling)
        seen: dict[str, Any] = {"endpoint": [], "batch": []}
        seen["format"] = resolve_chat_template_content_format(
            None, None, "auto", renderer.get_tokenizer(), model_config=engine.model_config
        )
        seen["positions"] = engine.model_config.max_model_len
        tokenizer = load_tokenizer(model)
        for case in json.loads((model / "cases.json").read_text()):
            _, (asked,) = renderer.render_chat([case["messages"]], chat, skip_mm_cache=True)
            turns = [Turn("human", case["request"]["question"])]
            asked_in_batch = _prompt(tokenizer, case["request"], turns, config, score=False).inputs
            (request,) = renderer.render_cmpl([asked_in_batch], skip_mm_cache=True)
            seen["endpoint"].append(list(asked["prompt_token_ids"]))
            seen["batch"].append(list(request["prompt_token_ids"]))
        (model / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
