"""The images that carry vLLM: the real server in them, asked about a picture."""

import json
from pathlib import Path

import first_steps
import pytest
import torch
from first_steps import contain

from nvila.components.data.media import load_image
from nvila.components.model.checkpoint.serving import write_serving
from nvila.components.model.decode.answer import generate
from nvila.components.model.text.conversation import Turn
from nvila.components.model.text.prompt import make_prompt

pytestmark = pytest.mark.containers
SCRIPT = """
import json, sys
from pathlib import Path
from nvila.components.serve import server
model, picture, question = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
log = Path("/tmp/serving.log")
started = server.start(model, port=8000, served_name="tiny", log_path=log)
try:
    server.wait_ready(started.url, 400, started.pid, log)
    answer = server.ask(started.url, "tiny", question, image=picture, max_tokens=6).text
except BaseException:
    print(log.read_text())
    raise
finally:
    server.stop(started.pid)
print("answer:", json.dumps(answer))
"""


@pytest.mark.parametrize("kind", ["serve", "quantize"])
def test_the_server_of_the_image_answers_as_torch_does(kind: str, tmp_path: Path) -> None:
    """A library of the system that vLLM wants, a cache that cannot be written, or a plugin that is not installed."""
    image = f"localhost/nvila/{kind}:dev"
    if reason := first_steps.why_not(image):
        pytest.skip(reason)
    from servable import QUESTION, picture, servable_model

    torch.set_num_threads(1)
    model, tokenizer = servable_model()
    write_serving(model, tokenizer, tmp_path / "model", dtype=torch.float32)
    seen = picture(tmp_path / "seen.png", 3)
    prompt = make_prompt([Turn("human", f"<image>\n{QUESTION}")], [load_image(seen)], model.config)
    expected = generate(model, tokenizer, [prompt], 6)[0].replace("\ufffd", "").strip()
    # Weights are written for their owner only, and the container has another user.
    for path in (tmp_path, *tmp_path.rglob("*")):
        path.chmod(0o755)
    command = ["python3", "-c", SCRIPT, str(tmp_path / "model"), str(seen), QUESTION]
    code, output = contain(image, command, tmp_path, {})
    assert code == 0, output
    assert json.loads(output.split("answer: ")[-1]).replace("\ufffd", "").strip() == expected
