"""Pages of a PDF as pictures; like any other medium a document may be broken or hostile.

PDFium, a large native library, renders in a process of its own that has limits of time and memory and knows no
credentials; what comes back are PNG files, which `media` reads under its own limits.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.components.contracts.children import signal_name
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
        MediaError: missing, encrypted, broken, more pages than `limits.max_pages`, no such page, or too much work.
    """
    match = _PAGE.fullmatch(str(path))
    file, page = (Path(match[1]), int(match[2])) if match and not path.is_file() else (path, 0)
    if not file.is_file():
        raise MediaError("missing_file", "no such media file", file)
    if file.stat().st_size > limits.max_bytes:
        raise MediaError("too_large", f"more than {limits.max_bytes} bytes", file, file.stat().st_size)
    with tempfile.TemporaryDirectory(prefix="nvila-pdf-") as folder:
        said = _render_apart(file, page, limits.max_pages, Path(folder))
        if "what" in said:
            raise MediaError(said["problem"], said["what"], file, said["value"])
        return [load_image(Path(folder, name), limits) for name in said["pages"]]


def _render_apart(file: Path, page: int, most: int, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", __spec__.name, str(file.absolute()), str(page), str(most), str(folder)]
    known = for_child(only=("PATH", "PYTHONPATH", "LD_LIBRARY_PATH"))
    try:
        done = subprocess.run(command, capture_output=True, timeout=SECONDS, env=known, check=False)
    except subprocess.TimeoutExpired:
        raise MediaError("too_large", f"a PDF that takes more than {SECONDS} s to render", file) from None
    if done.returncode:
        how = f"signal {signal_name(-done.returncode)}" if done.returncode < 0 else done.returncode
        raise MediaError("undecodable", "a PDF that ends its renderer", file, how)
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def _main(file: str, page: str, most: str, folder: str) -> dict[str, Any]:
    """In the process of its own: names of the rendered pages, or what is wrong."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(file)
        count = len(document)
        if count == 0 or int(page) > count:
            return _problem("undecodable", "the PDF has no such page", f"{page} of {count}")
        if not int(page) and count > int(most):
            return _problem("too_long", f"more than {most} pages; name one of them with #page=N", count)
        numbers = [int(page) - 1] if int(page) else range(count)
        return {"pages": [_render(document[number], Path(folder)) for number in numbers]}
    except pypdfium2.PdfiumError as error:
        if error.err_code == _PASSWORD:
            return _problem("undecodable", "the PDF is encrypted with a password", None)
        return _problem("undecodable", "the PDF cannot be read", str(error))
    except (MemoryError, ValueError, OSError) as error:
        return _problem("undecodable", "the PDF cannot be rendered", f"{type(error).__name__}: {error}")


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
    print(json.dumps(_main(*sys.argv[1:])))
