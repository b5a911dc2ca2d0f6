import pytest
import torch

from nvila.components.contracts.errors import DataError
from nvila.components.model.splice import splice

IMAGE, VIDEO = 90, 91
TABLE = torch.randn(80, 4, generator=torch.Generator().manual_seed(3))
ROWS = [[1, IMAGE, 2, 3], [4, VIDEO, IMAGE], [5, 6], [IMAGE, IMAGE, 7, VIDEO]]


def embed(ids: torch.Tensor) -> torch.Tensor:
    return TABLE[ids]


def media() -> dict[int, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(4)
    make = lambda n: torch.randn(n, 4, generator=generator)  # noqa: E731
    return {IMAGE: [make(3), make(1), make(2), make(5)], VIDEO: [make(4), make(2)]}


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = max(map(len, ROWS))
    fill = lambda row, pad: [pad] * (width - len(row)) + row if side == "left" else row + [pad] * (width - len(row))  # noqa: E731
    ids = torch.tensor([fill(row, 0) for row in ROWS])
    mask = torch.tensor([fill([1] * len(row), 0) for row in ROWS])
    return ids, mask, ids.masked_fill(mask == 0, -100)


def literal(limit: int | None = None) -> list[tuple[torch.Tensor, list[int]]]:
    """Each row's embeddings and labels by walking its tokens."""
    queues = {kind: iter(sequences) for kind, sequences in media().items()}
    rows = []
    for row in ROWS:
        parts: list[torch.Tensor] = []
        labels: list[int] = []
        for token in row:
            part = next(queues[token]) if token in queues else TABLE[token][None]
            parts.append(part)
            labels += [-100] * len(part) if token in queues else [token]
        rows.append((torch.cat(parts)[:limit], labels[:limit]))
    return rows


@pytest.mark.parametrize("in_side", ["left", "right"])
@pytest.mark.parametrize("out_side", ["left", "right"])
@pytest.mark.parametrize("limit", [None, 5])
def test_against_walking(in_side: str, out_side: str, limit: int | None) -> None:
    """Prevents the reference's defect: left-padded input indexed as if it were not padded."""
    ids, mask, labels = padded(in_side)
    out = splice(embed, ids, mask, labels, media(), max_length=limit, side=out_side)  # type: ignore[arg-type]
    expected = literal(limit)
    width = max(len(row) for row, _ in expected)
    assert out.embeds_BTH.shape == (len(ROWS), width, 4)
    assert out.labels_BT is not None
    for b, (row, row_labels) in enumerate(expected):
        n = len(row)
        span = slice(width - n, width) if out_side == "left" else slice(0, n)
        assert torch.equal(out.embeds_BTH[b, span], row)
        assert out.labels_BT[b, span].tolist() == row_labels
        assert out.position_ids_BT[b, span].tolist() == list(range(n))
        assert out.attention_mask_BT[b].sum() == n and bool(out.attention_mask_BT[b, span].all())
        rest = ~out.attention_mask_BT[b]
        assert not out.embeds_BTH[b, rest].any() and bool((out.labels_BT[b, rest] == -100).all())


def test_too_many_and_too_few_media() -> None:
    """Prevents a picture that is silently dropped, or taken from the next sample."""
    ids, mask, labels = padded("right")
    for count in (3, 5):
        wrong = media()
        wrong[IMAGE] = (wrong[IMAGE] * 2)[:count]
        with pytest.raises(DataError, match="4 media tokens but"):
            splice(embed, ids, mask, labels, wrong)


def test_gradients_reach_text_and_media() -> None:
    """Prevents a splice that cuts the projector off from the loss."""
    table = TABLE.clone().requires_grad_()
    picture = torch.randn(2, 4, requires_grad=True)
    out = splice(lambda i: table[i], torch.tensor([[1, IMAGE]]), torch.ones(1, 2), None, {IMAGE: [picture]})
    out.embeds_BTH.sum().backward()
    assert picture.grad is not None and bool((picture.grad == 1).all())
    assert table.grad is not None and table.grad[1].sum() == 4


@pytest.mark.parametrize("rows", [None, [0, 0, 0, 0], [0, 0, 1, 2]])
def test_positions_are_padded_to_a_multiple(rows: list[int] | None) -> None:
    """No kernel multiplies nine rows in FP8; and what is padded must have no loss, nor be seen by anything."""
    ids, mask, labels = padded("right")
    given = {"rows": None if rows is None else torch.tensor(rows)}
    plain = splice(embed, ids, mask, labels, media(), **given)  # type: ignore[arg-type]
    out = splice(embed, ids, mask, labels, media(), multiple=16, **given)  # type: ignore[arg-type]
    count, width = plain.attention_mask_BT.shape
    assert out.attention_mask_BT.numel() % 16 == 0 and out.attention_mask_BT.numel() - count * width < 16
    for name in ("embeds_BTH", "attention_mask_BT", "position_ids_BT", "labels_BT"):
        assert torch.equal(getattr(out, name)[:, :width], getattr(plain, name)), name
    assert not out.attention_mask_BT[:, width:].any() and (out.labels_BT[:, width:] == -100).all()  # type: ignore[index]
    if rows == [0, 0, 0, 0]:
        # torch leaves out what no sample has, and what it leaves out need not be finite.
        assert plain.lengths_S is not None and out.lengths_S is not None
        assert out.lengths_S.tolist() == [*plain.lengths_S.tolist(), out.attention_mask_BT.numel() - width]
