import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nvila.components.contracts.errors import DataError
from nvila.components.data import pdf
from nvila.components.data.media import Limits, MediaError, load_image, probe, size
from nvila.components.data.pdf import is_pdf, load_pages

COLOURS = [(200, 30, 30), (30, 180, 40), (30, 40, 200)]


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pages of one colour each, 2 x 1 inches."""
    path = tmp_path_factory.mktemp("pdf") / "Three.PDF"
    first, *others = [Image.new("RGB", (144, 72), colour) for colour in COLOURS]
    first.save(path, "PDF", save_all=True, append_images=others, resolution=72)
    return path


def assembled(page: bytes, *more: bytes, trailer: bytes = b"") -> bytes:
    """A one-page document by hand, with a table of its objects that is right; the page is object 3."""
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>", page, *more]
    content, places = b"%PDF-1.4\n", []
    for number, each in enumerate(objects, 1):
        places.append(len(content))
        content += b"%d 0 obj\n%b\nendobj\n" % (number, each)
    start, size = len(content), len(objects) + 1
    content += b"xref\n0 %d\n0000000000 65535 f \n" % size + b"".join(b"%010d 00000 n \n" % place for place in places)
    return content + b"trailer\n<< /Size %d /Root 1 0 R %b >>\nstartxref\n%d\n%%%%EOF\n" % (size, trailer, start)


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
    path = tmp_path / "a.pdf"
    path.write_bytes(assembled(b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 1000000 500000] >>"))
    (image,) = load_pages(path)
    assert max(image.size) <= 4097


def test_an_encrypted_document_says_so(tmp_path: Path) -> None:
    """Prevents a message that lets users look for damage where a password is missing."""
    secret = b"<" + b"ab" * 32 + b">"
    lock = b"<< /Filter /Standard /V 1 /R 2 /O %b /U %b /P -4 >>" % (secret, secret)
    page = b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 72 72] >>"
    path = tmp_path / "a.pdf"
    path.write_bytes(assembled(page, lock, trailer=b"/Encrypt 4 0 R /ID [<aa> <aa>]"))
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


def drawing(path: Path, content: bytes, *more: bytes) -> Path:
    """A page of this deflated content; `/I` in it is the first of `more`, objects 5 and on."""
    page = b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 99 99] /Contents 4 0 R"
    page += b" /Resources << /XObject << /I 5 0 R >> >> >>"
    packed = zlib.compress(content)
    stream = b"<< /Filter /FlateDecode /Length %d >>\nstream\n%b\nendstream" % (len(packed), packed)
    path.write_bytes(assembled(page, stream, *more))
    return path


def picture(width: int, height: int) -> bytes:
    """A black one, of which only the size is told."""
    return (
        b"<< /Type /XObject /Subtype /Image /Width %d /Height %d /ColorSpace /DeviceGray /BitsPerComponent 8 "
        b"/Length 0 >>\nstream\n\nendstream" % (width, height)
    )


def test_too_much_memory_names_that_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a bomb from taking the machine with it, and a refusal that speaks of damage, or of another limit."""
    path = drawing(tmp_path / "states.pdf", b"q " * 2**22)
    monkeypatch.setattr(pdf, "SECONDS", 60)
    monkeypatch.setattr(pdf, "MEMORY_BYTES", 2**29)
    with pytest.raises(MediaError, match=r"more than 0.5 GiB of memory to render") as caught:
        load_pages(path)
    assert caught.value.problem == "too_large"


def test_pictures_in_a_document_keep_the_limit_of_pictures(tmp_path: Path) -> None:
    """Prevents a black area in the place of a picture that PDFium cannot hold, on the page or in a form on it."""
    path = drawing(tmp_path / "a.pdf", b"/I Do", picture(9000, 8000))
    with pytest.raises(MediaError, match=r"more than 50000000 pixels on page 1.*9000x8000"):
        load_pages(path)
    assert len(load_pages(path, Limits(max_pixels=9000 * 8000))) == 1
    form = b"<< /Type /XObject /Subtype /Form /BBox [0 0 99 99] /Resources << /XObject << /P 6 0 R >> >> /Length 5 >>"
    path = drawing(tmp_path / "b.pdf", b"/I Do", form + b"\nstream\n/P Do\nendstream", picture(9000, 8000))
    with pytest.raises(MediaError, match=r"more than 50000000 pixels"):
        load_pages(path)


def test_a_document_among_the_pictures_of_data_is_named(document: Path, tmp_path: Path) -> None:
    """Prevents "cannot identify image file", which leaves people to guess that documents are for `infer` only."""
    path = tmp_path / "scan.png"
    path.write_bytes(document.read_bytes())
    for read in (load_image, partial(probe, kind="image"), partial(size, kind="video")):
        with pytest.raises(MediaError, match="a PDF, and no picture"):
            read(path)


def test_a_renderer_that_hangs_or_dies(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a document that crashes or occupies the native library from taking the platform with it."""
    monkeypatch.setattr(pdf, "SECONDS", 0.01)
    with pytest.raises(MediaError, match=r"more than 0.01 s to render"):
        load_pages(document)
    monkeypatch.setattr(pdf, "SECONDS", 60)
    for command, said in (
        ("false", "ends its renderer.*exit code 1"),
        ("kill -s SEGV $$", "ends its renderer.*SIGSEGV"),
        ("echo heap >&2; kill -s ABRT $$", "ends its renderer.*SIGABRT"),
        ("kill -s XCPU $$", "more than 60 s"),
    ):
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\n{command}\n")
        python.chmod(0o755)
        monkeypatch.setattr(pdf.sys, "executable", str(python))
        with pytest.raises(MediaError, match=said):
            load_pages(document)
