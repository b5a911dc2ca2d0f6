"""Probing of many files: one bad decoder does not end the step."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nvila.components.data.media import Limits
from nvila.components.validate import probing
from nvila.components.validate.probing import Medium, probe_all


def test_a_crashing_decoder_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents one hostile file that kills its process from ending the validation of all others."""
    names = [f"{index}.png" for index in range(12)]
    for index, name in enumerate(names):
        Image.new("RGB", (9, 9), (index, 0, 0)).save(tmp_path / name)
    real = probing.probe

    def crash(path: Path, *rest: Any) -> Any:
        if path.name == "5.png":
            os._exit(1)
        return real(path, *rest)

    monkeypatch.setattr(probing, "probe", crash)
    monkeypatch.setattr(probing, "CHUNK", 3)
    media = [Medium(str(tmp_path), name, "image") for name in names]
    found = probe_all(media, Limits())
    assert [found[medium].status for medium in media] == ["ok"] * 5 + ["undecodable"] + ["ok"] * 6
    assert "crashed" in found[media[5]].detail
