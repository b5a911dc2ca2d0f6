from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nvila.components.contracts.errors import DataError
from nvila.components.data import pdf
from nvila.components.data.media import Limits
from nvila.components.data.pdf import is_pdf, load_pages

COLOURS = [(200, 30, 30), (30, 180, 40), (30, 40, 200)]


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pages of one colour each, 2 x 1 inches."""
    path = tmp_path_factory.mktemp("pdf") / "Three.PDF"
    first, *others = [Image.new("RGB", (144, 72), colour) for colour in COLOURS]
    first.save(path, "PDF", save_all=True, append_images=others, resolution=72)
    return path


def written(path: Path, page: str, more: str = "", trailer: str = "") -> Path:
    """A one-page document by hand, with a table of its objects that is right."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", "<< /Type /Pages /Kids [3 0 R] /Count 1 >>", page]
    objects += [more] if more else []
    text = "%PDF-1.4\n"
    places = []
    for number, content in enumerate(objects, 1):
        places.append(len(text))
        text += f"{number} 0 obj\n{content}\nendobj\n"
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    text += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
    text += f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R {trailer} >>\nstartxref\n{text.index('xref')}\n%%EOF\n"
    path.write_text(text)
    return path


def test_pages_in_order(document: Path) -> None:
    """Prevents pages out of order, exchanged colours, and another size than the page's."""
    pages = load_pages(document)
    assert [page.size for page in pages] == [(300, 150)] * 3
    for page, colour in zip(pages, COLOURS, strict=True):
        assert np.abs(np.asarray(page)[75, 150].astype(int) - colour).max() < 4


def test_one_page(document: Path) -> None:
    """Prevents counting pages from 0, and a page that is not there from being another one."""
    (page,) = load_pages(Path(f"{document}#page=2"))
    assert np.asarray(page)[75, 150].argmax() == 1
    with pytest.raises(DataError, match=r"no such page.*4 of 3"):
        load_pages(Path(f"{document}#page=4"))


def test_names() -> None:
    """Prevents pictures from being read as documents and documents as pictures."""
    assert [is_pdf(Path(n)) for n in ("a.pdf", "a.PDF", "a/b.pdf#page=12")] == [True] * 3
    assert [is_pdf(Path(n)) for n in ("a.png", "a.pdf.png", "a.pdf#page=0", "a.pdf#page=x")] == [False] * 4


def test_limits(document: Path) -> None:
    """Prevents a long or large document from filling memory."""
    with pytest.raises(DataError, match="more than 2 pages"):
        load_pages(document, Limits(max_pages=2))
    assert len(load_pages(Path(f"{document}#page=3"), Limits(max_pages=2))) == 1
    with pytest.raises(DataError, match="more than 10 bytes"):
        load_pages(document, Limits(max_bytes=10))
    with pytest.raises(DataError, match="more than 100 pixels"):
        load_pages(document, Limits(max_pixels=100))


def test_a_huge_page_is_rendered_small(tmp_path: Path) -> None:
    """Prevents a page of kilometres from asking for gigabytes of pixels."""
    page = "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 1000000 500000] >>"
    (image,) = load_pages(written(tmp_path / "a.pdf", page))
    assert max(image.size) <= 4097


def test_an_encrypted_document_says_so(tmp_path: Path) -> None:
    """Prevents a message that lets users look for damage where a password is missing."""
    secret = "<" + "ab" * 32 + ">"
    lock = f"<< /Filter /Standard /V 1 /R 2 /O {secret} /U {secret} /P -4 >>"
    page = "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 72 72] >>"
    path = written(tmp_path / "a.pdf", page, lock, "/Encrypt 4 0 R /ID [<aa> <aa>]")
    with pytest.raises(DataError, match="encrypted"):
        load_pages(path)


@pytest.mark.parametrize("content", [b"", b"not a PDF", b"%PDF-1.4\n" + b"\x00\xff" * 500])
def test_broken_documents(tmp_path: Path, content: bytes) -> None:
    """Prevents a traceback on files that are no PDF or broken ones."""
    path = tmp_path / "a.pdf"
    path.write_bytes(content)
    with pytest.raises(DataError):
        load_pages(path)
    with pytest.raises(DataError, match="no such media file"):
        load_pages(tmp_path / "none.pdf")


def test_a_renderer_that_hangs_or_dies(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a document that crashes or occupies the native library from taking the platform with it."""
    monkeypatch.setattr(pdf, "SECONDS", 0.01)
    with pytest.raises(DataError, match="to render"):
        load_pages(document)
    monkeypatch.setattr(pdf, "SECONDS", 60)
    monkeypatch.setattr(pdf.sys, "executable", "/bin/false")
    with pytest.raises(DataError, match="ends its renderer"):
        load_pages(document)
