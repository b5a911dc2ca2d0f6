"""Run by the serving Python: what `processing.Kept` has of tiles that come, are found, and push each other out."""

from __future__ import annotations

import json
from typing import Any

import torch


def main() -> None:
    """Print what was found, as JSON."""
    from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem, MultiModalKwargsItem

    from nvila.components.serve.processing import Kept

    def tiles(size_bytes: int) -> tuple[Any, list[Any]]:
        data = torch.zeros(size_bytes, dtype=torch.uint8)
        return MultiModalKwargsItem({"tiles": MultiModalFieldElem(data=data, field=MultiModalBatchedField())}), []

    kept, small, large = Kept(1000), tiles(700), tiles(800)
    kept.get_and_update_item(small, "small")
    found = {"before": [kept.is_cached_item("small"), kept.is_cached_item("large")]}
    kept.get_and_update_item(large, "large")
    found["within the prompt"] = [kept.get_and_update_item(None, "small")[0] is small[0]]
    kept.release()
    found["after it"] = [kept.is_cached_item("small"), kept.is_cached_item("large")]
    nothing = Kept(0)
    found["of no room"] = [nothing.get_and_update_item(small, "small")[0] is small[0], nothing.is_cached_item("small")]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
