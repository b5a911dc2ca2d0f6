import pytest

from nvila.components.model.checkpoint.describe import image_tokens, video_tokens
from nvila.components.model.config.variants import VARIANTS, variant_of
from nvila.components.model.nvila import NVILA, empty_model

TOWER = 588 * 1152 + 1152 + 1024 * 1152
TOWER += 27 * (4 * (1152 * 1152 + 1152) + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152) + 2 * 1152
SIZES = {  # hidden, layers, kv width, mlp, separate output layer
    "2B": (1536, 28, 256, 8960, False),
    "8B": (3584, 28, 512, 18944, True),
    "15B": (5120, 48, 1024, 13824, True),
}


def decoder(hidden: int, layers: int, kv: int, mlp: int, untied: bool) -> int:
    attention = (hidden * hidden + hidden) + 2 * (hidden * kv + kv) + hidden * hidden
    block = attention + 3 * hidden * mlp + 2 * hidden
    return layers * block + hidden + 151648 * hidden * (2 if untied else 1)


def projector(name: str, hidden: int) -> int:
    if "Lite" in name:
        first, second = 9 * 1152, 3 * 1152
        chain = 2 * first + first * second + second + 2 * second + second * hidden + hidden
    else:
        first = 4 * 1152 * (1 if "Video" in name else 3)
        chain = 2 * first + first * hidden + hidden
    return chain + hidden * hidden + hidden


def count(model: NVILA, part: str) -> int:
    return sum(parameter.numel() for parameter in getattr(model, part).parameters())


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_counts(name: str) -> None:
    """Prevents a variant of other sizes than the published one: counts agree with the written-out sums."""
    model = empty_model(VARIANTS[name])
    sizes = next(sizes for short, sizes in SIZES.items() if short in name.split("-"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert count(model, "vision_tower") == TOWER
    assert count(model, "mm_projector") == projector(name, sizes[0])
    assert count(model, "llm") == decoder(*sizes)
    assert variant_of(VARIANTS[name]) == name


def test_sizes_of_published_files() -> None:
    """Prevents a tower or decoder that only nearly fits: their bf16 files are listed with 827 MB and 15.22 GB."""
    model = empty_model(VARIANTS["NVILA-8B"])
    assert round(2 * count(model, "vision_tower") / 1e6) == 827
    assert 2 * count(model, "llm") / 1e9 == pytest.approx(4.87 + 4.93 + 4.33 + 1.09, abs=0.02)
    norms = [p.numel() for n, p in model.vision_tower.named_parameters() if "layer_norm" in n or "layernorm" in n]
    assert sum(norms) == 126_720


@pytest.mark.parametrize(
    ("name", "image", "video"),
    [
        ("NVILA-8B", (9 * 256 + 1, 12 * 256 + 1), 8 * 257),
        ("NVILA-Lite-2B", (123, 13 * 123), 8 * 122),
        ("NVILA-8B-Video", (257, 257), 8224),
        ("NVILA-Lite-15B-Video", (122, 122), 32 * 122),
    ],
)
def test_visual_tokens(name: str, image: tuple[int, int], video: int) -> None:
    """Prevents other token counts than the paper's: 9 to 12 tiles of 256, 1 to 12 of 121 and a thumbnail, 32 frames."""
    assert image_tokens(VARIANTS[name]) == image
    assert video_tokens(VARIANTS[name]) == video


def test_another_architecture_has_no_name(configure: object) -> None:
    """Prevents a toy from being called a published variant."""
    assert variant_of(configure()) is None  # type: ignore[operator]
