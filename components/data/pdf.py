"""Pages of a PDF as pictures; like any other medium a document may be broken or hostile.

PDFium, a large native library, renders in a process of its own that has limits of time and memory and knows no
credentials; what comes back are PNG files, which `media` reads under its own limits.
"""

from __future__ import annotations

import json
import math
import re
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.components.contracts.environment import for_child
from nvila.components.data.media import Limits, MediaError, load_image

if TYPE_CHECKING:
    from PIL import Image

DOTS_PER_INCH = 150
"""An A4 page becomes 1240 x 1754 pixels, about what the largest tiling keeps of it."""
LONGEST_SIDE = 4096
"""Pixels; larger pages, posters say, are rendered with fewer dots."""
SECONDS = 15
MEMORY_BYTES = 2 * 2**30
DEEPEST_FORM = 15
"""Forms inside of forms whose pictures are looked at."""
_PASSWORD = 4
"""PDFium's code for a document that is encrypted with a password."""
_LIMITS = Limits()
_PAGE = re.compile(r"(.*\.pdf)#page=([1-9]\d{0,6})", re.IGNORECASE | re.DOTALL)


def is_pdf(path: Path) -> bool:
    """Whether a name means a document or one of its pages, as in `report.pdf#page=3`."""
    return path.suffix.lower() == ".pdf" or _PAGE.fullmatch(str(path)) is not None


def load_pages(path: Path, limits: Limits = _LIMITS) -> list[Image.Image]:
    """Every page of a document as an RGB picture, or the one page that `path` ends with: `#page=3`, counted from 1.

    Raises:
        MediaError: missing, encrypted, broken, no such page, more pages than `limits.max_pages`, a picture of more
            pixels than `limits.max_pixels` in it, or more work than `SECONDS` or `MEMORY_BYTES` allow.
    """
    match = _PAGE.fullmatch(str(path))
    file, page = (Path(match[1]), int(match[2])) if match and not path.is_file() else (path, 0)
    if not file.is_file():
        raise MediaError("missing_file", "no such media file", file)
    if file.stat().st_size > limits.max_bytes:
        raise MediaError("too_large", f"more than {limits.max_bytes} bytes", file, file.stat().st_size)
    with tempfile.TemporaryDirectory(prefix="nvila-pdf-") as folder:
        said = _render_apart(_Work(str(file.absolute()), folder, page, limits.max_pages, limits.max_pixels), file)
        if "what" in said:
            raise MediaError(said["problem"], said["what"], file, said["value"])
        return [load_image(Path(folder, name), limits) for name in said["pages"]]


@dataclass(frozen=True)
class _Work:
    """What the renderer is asked."""

    file: str
    folder: str
    page: int
    """Counted from 1; 0 is all of them."""
    max_pages: int
    max_pixels: int
    seconds: float = field(default_factory=lambda: SECONDS)
    memory_bytes: int = field(default_factory=lambda: MEMORY_BYTES)


def _render_apart(work: _Work, file: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", __spec__.name, json.dumps(asdict(work))]
    known = for_child(only=("PATH", "PYTHONPATH", "LD_LIBRARY_PATH"))
    slow = MediaError("too_large", f"a PDF that takes more than {work.seconds:g} s to render", file)
    try:
        done = subprocess.run(command, capture_output=True, timeout=work.seconds, env=known, check=False)
    except subprocess.TimeoutExpired:
        raise slow from None
    if done.returncode == -signal.SIGXCPU:
        raise slow
    # PDFium aborts without a word where it gets no memory; a C library that finds its heap damaged says so first.
    if done.returncode == -signal.SIGABRT and not done.stderr:
        raise MediaError("too_large", _greedy(work), file)
    if done.returncode:
        how = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit code {done.returncode}"
        raise MediaError("undecodable", "a PDF that ends its renderer", file, how)
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def _greedy(work: _Work) -> str:
    return f"a PDF that takes more than {work.memory_bytes / 2**30:g} GiB of memory to render"


def _main(work: _Work) -> dict[str, Any]:
    """In the process of its own: names of the rendered pages, or what is wrong."""
    seconds = math.ceil(work.seconds)
    resource.setrlimit(resource.RLIMIT_AS, (work.memory_bytes, work.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))  # at the second one the signal is SIGKILL
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(work.file)
        count = len(document)
        if count == 0 or work.page > count:
            return _problem("undecodable", "the PDF has no such page", f"{work.page} of {count}")
        if not work.page and count > work.max_pages:
            return _problem("too_long", f"more than {work.max_pages} pages; name one of them with #page=N", count)
        names = []
        for number in [work.page] if work.page else range(1, count + 1):
            page = document[number - 1]
            if size := _too_many_pixels(page, work.max_pixels):
                return _problem("too_large", f"a picture of more than {work.max_pixels} pixels on page {number}", size)
            names.append(_render(page, Path(work.folder)))
        return {"pages": names}
    except pypdfium2.PdfiumError as error:
        if error.err_code == _PASSWORD:
            return _problem("undecodable", "the PDF is encrypted with a password", None)
        return _problem("undecodable", "the PDF cannot be read", str(error))
    except MemoryError:
        return _problem("too_large", _greedy(work), None)
    except (ValueError, OSError) as error:
        return _problem("undecodable", "the PDF cannot be rendered", f"{type(error).__name__}: {error}")


def _too_many_pixels(page: Any, most: int) -> str | None:
    """The size of a picture on the page that is too large: PDFium shows one that it cannot hold as a black area."""
    import ctypes

    import pypdfium2.raw as pdfium

    width, height = ctypes.c_uint(), ctypes.c_uint()
    for image in _images(page, pdfium.FPDFPage_CountObjects, pdfium.FPDFPage_GetObject):
        known = pdfium.FPDFImageObj_GetImagePixelSize(image, width, height)  # what has no size is not shown
        if known and width.value * height.value > most:
            return f"{width.value}x{height.value}"
    return None


def _images(parent: Any, count: Callable[[Any], int], get: Callable[[Any, int], Any], depth: int = 0) -> Iterator[Any]:
    """The pictures of a page or of a form on it. A page may have a million objects: `PdfPage.get_objects` takes 9 s."""
    import pypdfium2.raw as pdfium

    for place in range(count(parent)):
        each = get(parent, place)
        kind = pdfium.FPDFPageObj_GetType(each)
        if kind == pdfium.FPDF_PAGEOBJ_IMAGE:
            yield each
        elif kind == pdfium.FPDF_PAGEOBJ_FORM and depth < DEEPEST_FORM:
            yield from _images(each, pdfium.FPDFFormObj_CountObjects, pdfium.FPDFFormObj_GetObject, depth + 1)


def _render(page: Any, folder: Path) -> str:
    width, height = page.get_size()
    if not (width > 0 and height > 0):
        raise ValueError(f"a page of {width} x {height} points")
    scale = min(DOTS_PER_INCH / 72, LONGEST_SIDE / max(width, height))
    image = page.render(scale=scale, may_draw_forms=False).to_pil().convert("RGB")
    name = f"{len(list(folder.iterdir())):05d}.png"
    image.save(folder / name, compress_level=1)
    return name


def _problem(problem: str, what: str, value: object) -> dict[str, Any]:
    return {"problem": problem, "what": what, "value": value}


if __name__ == "__main__":
    print(json.dumps(_main(_Work(**json.loads(sys.argv[1])))))
