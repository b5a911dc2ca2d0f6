import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nvila.components.model.vision import resize as subject
from nvila.components.model.vision.resize import resize

PICTURES = ("noise", "black and white", "stripes", "blocks", "ramp")


@pytest.fixture(autouse=True)
def _small_and_huge_pictures_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "_is_worthwhile", lambda *_: True)


def paint(kind: str, width: int, height: int, seed: int) -> Image.Image:
    """Contents that bring sums onto halves (two values, blocks), out of range (edges), or everywhere."""
    rng = np.random.default_rng(seed)
    if kind == "stripes":
        pixels = np.broadcast_to((np.arange(width) % 2 * 255)[None, :, None], (height, width, 3))
    elif kind == "blocks":
        pixels = np.kron(rng.integers(0, 256, (height // 2 + 1, width // 2 + 1, 3)), np.ones((2, 2, 1)))
    elif kind == "ramp":
        pixels = np.linspace(0, 255, width * height * 3).reshape(height, width, 3)
    else:
        pixels = (
            rng.integers(0, 256, (height, width, 3))
            if kind == "noise"
            else rng.integers(0, 2, (height, width, 3)) * 255
        )
    return Image.fromarray(np.ascontiguousarray(pixels[:height, :width]).astype(np.uint8))


@given(
    st.sampled_from(PICTURES),
    st.tuples(st.integers(1, 150), st.integers(1, 150)),
    st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200)), min_size=1, max_size=3),
    st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_the_same_as_pillow(kind: str, size: tuple[int, int], targets: list[tuple[int, int]], seed: int) -> None:
    """Prevents a single value that differs from Pillow's, whatever the sizes, contents and order of directions."""
    image = paint(kind, *size, seed)
    for target, made in zip(targets, resize(image, targets), strict=True):
        assert np.array_equal(made, np.asarray(image.resize(target, Image.Resampling.BICUBIC))), target


@pytest.mark.parametrize("kind", PICTURES)
@pytest.mark.parametrize("size", [(1280, 720), (600, 1100)])
def test_the_same_at_real_sizes(kind: str, size: tuple[int, int]) -> None:
    """Prevents weights that differ in their last bit, which only many values show."""
    image, targets = paint(kind, *size, 0), [(448, 448), (896, 896), (1344, 1344)]
    for target, made in zip(targets, resize(image, targets), strict=True):
        assert np.array_equal(made, np.asarray(image.resize(target, Image.Resampling.BICUBIC))), target


def test_another_pillow_does_the_work_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents pixels in an order of directions that a future Pillow no longer has."""
    monkeypatch.setattr(subject, "KNOWN", "0")
    monkeypatch.setattr(subject, "_mixed", None)
    image = paint("noise", 90, 40, 0)
    assert np.array_equal(resize(image, [(50, 60)])[0], np.asarray(image.resize((50, 60), Image.Resampling.BICUBIC)))


def test_only_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents one small result of a huge picture from taking the memory and time of the whole picture."""
    monkeypatch.undo()
    sizes = [(448, 448), (896, 896), (1792, 1344)]
    assert subject._is_worthwhile((1920, 1080), sizes) and subject._is_worthwhile((640, 480), sizes)
    assert not subject._is_worthwhile((7000, 7000), sizes) and not subject._is_worthwhile((640, 480), sizes[:1])


def test_the_pinned_pillow_is_the_known_one() -> None:
    """Prevents a changed lock file from switching the fast way off without a word."""
    import PIL

    assert PIL.__version__ == subject.KNOWN
