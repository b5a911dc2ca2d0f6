"""The documents say what the code does: their tables, commands, snippets, links and numbers are checked."""

import hashlib
import json
import pkgutil
import re
import shlex
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import pytest

from nvila.components.contracts import environment
from nvila.components.contracts.environment import Environment
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.recipe.data import Source
from nvila.components.contracts.recipe.form import Form, fill_in
from nvila.components.contracts.recipe.reader import document, layers
from nvila.components.data.sampling import Sampling
from nvila.components.serve.server import chat_request
from nvila.components.validate.annotations import read_records
from nvila.pipelines.show import readme as docs

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FORBIDDEN = (
    r"seamless\w*|effortless\w*|blazing\w*|cutting-edge|state-of-the-art|world-class|revolutionary|game-chang\w*"
    r"|powerful|best-in-class|turnkey|delightful\w*|coming soon|todo|tbd|fixme|xxx|lorem"
)
"""Praise, promises and placeholders."""


def _text(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def _code(text: str) -> list[str]:
    """Lines of code blocks, and code spans."""
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [line.strip() for block in blocks for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", prose)


def _snippet(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    assert found, f"no {language} snippet"
    return found[1]


@pytest.mark.parametrize("document", docs.TABLES)
def test_tables_are_those_of_the_code(document: str) -> None:
    """A table that describes last month's steps, recipes or variables misleads everyone who trusts it."""
    assert docs.fill(_text(document), docs.TABLES[document]) == _text(document), "`make docs`, then look at the diff"


def test_filling_needs_the_markers() -> None:
    """A lost marker would silently end the generation of a table."""
    with pytest.raises(ValueError, match="recipes"):
        docs.fill(README.replace("<!-- /recipes -->", ""), docs.TABLES["README.md"])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_relative_links_resolve(document: str) -> None:
    """A file that was moved leaves its links behind."""
    links = re.findall(r"\]\(([^)#\s]+)", _text(document))
    relative = [link for link in links if "://" not in link]
    assert [link for link in relative if not ((ROOT / document).parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_source_files_exist(document: str) -> None:
    """SECURITY.md says where a threat is met: a file that is gone means that nobody knows any more."""
    named = [
        span
        for span in _code(_text(document))
        if re.fullmatch(r"(charts|components|infra|pipelines|tests)/[\w./-]+\w", span)
    ]
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_targets_exist(document: str) -> None:
    """A newcomer's first command must not be unknown."""
    targets = set(re.findall(r"^([a-z-]+):.*## ", _text("Makefile"), flags=re.MULTILINE))
    used = {match[1] for span in _code(_text(document)) if (match := re.match(r"make ([a-z-]+)", span))}
    assert used <= targets
    assert document != "README.md" or used >= {"run", "test", "help"}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_nvila_commands_parse(document: str) -> None:
    """A command, option or argument that was renamed must be renamed here, too."""
    commands = dict(docs.commands())
    used = set()
    for line in [span for span in _code(_text(document)) if span.startswith("nvila ")]:
        words = shlex.split(line)[1:]
        name = next((name for name in commands if words[: len(name.split())] == name.split()), None)
        assert name, line
        used.add(name)
        arguments = words[len(name.split()) :]
        commands[name].make_context(name, arguments or _any_arguments(commands[name]))
    assert document != "README.md" or used == set(commands)


def _any_arguments(command: Any) -> list[str]:
    """For a bare mention of a command: something for each argument and option that it requires."""
    filled = []
    for parameter in (parameter for parameter in command.params if parameter.required):
        value = "hf" if parameter.name == "to" else "x"
        filled += [parameter.opts[0], value] if parameter.param_type_name == "option" else [value]
    return filled


def test_the_overrides_of_the_text_fit_the_recipe() -> None:
    """An override with a key that the schema has dropped would be refused."""
    from nvila.pipelines.commands.overrides import parse_overrides

    pairs = re.findall(r"--override ([\w.]+=[\w.-]+)", README)
    assert len(pairs) >= 2
    overrides = parse_overrides(layers(document("tiny")), pairs)
    fill_in(Form(recipe="tiny", overrides=overrides))


def test_the_curl_command_is_a_request_that_the_endpoint_takes(tmp_path: Path) -> None:
    """Quoting of JSON in a shell breaks easily, and a changed name or port makes the command useless."""
    command = re.search(r"^curl .*?\}'$", README, flags=re.DOTALL | re.MULTILINE)
    assert command
    picture = tmp_path / "data/tiny/digits/images/heldout/0000.png"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"png")
    show = 'curl() { for argument in "$@"; do printf "%s\\0" "$argument"; done; }\n'
    ran = subprocess.run(["bash", "-c", show + command[0]], capture_output=True, text=True, check=True, cwd=tmp_path)
    arguments = ran.stdout.split("\0")[:-1]
    body = json.loads(arguments[arguments.index("-d") + 1])
    tiny = fill_in(Form(recipe="tiny"))
    wanted = chat_request(tiny.register_.model_name, body["messages"][0]["content"][1]["text"], image=picture)
    del wanted["max_tokens"]
    assert body == wanted
    assert f"http://{tiny.rollout.host}:{tiny.rollout.port}/v1/chat/completions" in arguments


def test_the_record_of_the_readme_is_read(tmp_path: Path) -> None:
    """The format that users write their data in is the one that the step reads."""
    (tmp_path / "sft.json").write_text(f"[{_snippet('json')}]")
    row = read_records(Source(name="plates", kind="image", path=str(tmp_path)), "sft", tmp_path / "sft.json")[0]
    assert (row["question"], row["answer"], row["markers"], row["media_count"]) == (
        "What does the plate say?",
        "AB 123",
        1,
        1,
    )


def test_the_recipe_snippet_makes_a_recipe() -> None:
    """Following the five points must lead to a recipe that is accepted."""
    recipe = layers(document(textwrap.dedent(_snippet("yaml")))).recipe()
    assert [source.name for source in recipe.data.sources] == ["plates"]
    assert recipe.name != "tiny" != recipe.register_.model_name


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first program that a user of the library writes is this one."""
    from PIL import Image

    from nvila.components.model.checkpoint.native import save_native
    from nvila.components.model.config.config import ModelConfig
    from nvila.components.model.fresh import init_model
    from nvila.components.model.text.tokenizer import train_tokenizer

    tower = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    decoder = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = ModelConfig(
        vision=tower | {"image_size": 28, "patch_size": 14, "vision_use_head": False},
        llm=decoder | {"vocab_size": 300, "intermediate_size": 64, "max_position_embeddings": 512},
        projector="mlp_downsample",
        vision_mode="dynamic_s2",
        s2_scales=(28, 56),
        s2_output_scale=-1,
        max_tiles=6,
        select_layer=-2,
        max_length_tokens=256,
        sampling=Sampling(4),
        video_pool_sizes=((1, 1, 1),),
    )
    tokenizer = train_tokenizer(["What is shown? A plate"], 300)
    save_native(init_model(config, tokenizer, seed=0), tokenizer, tmp_path / "model")
    Image.new("RGB", (80, 50), "red").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(_snippet("python"), names)
    assert isinstance(names["answer"], str)
    assert tokenizer.decode(names["supervised"]) == "A plate<|im_end|>"
    assert list((tmp_path / "converted").glob("*.safetensors"))


def test_the_named_functions_exist() -> None:
    """A function that was moved would be looked for in vain."""
    named = re.findall(r"`(nvila\.[\w.]+)`", README)
    assert len(named) >= 10
    for name in named:
        pkgutil.resolve_name(name)


def test_exit_codes_are_all_there() -> None:
    """A retry policy is written by this table."""
    assert [int(code) for code in re.findall(r"^\| (\d+) \|", README, flags=re.MULTILINE)] == sorted(map(int, Exit))


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name != "docs/log.md"])
def test_environment_variables_are_read_somewhere(document: str) -> None:
    """A variable that nothing reads is set in vain."""
    named = set(re.findall(r"\b(?:NVILA|MLFLOW)_[A-Z_]+", _text(document)))
    assert named <= {field.alias for field in Environment.model_fields.values()} | environment.OF_TESTS


def test_what_tests_read_is_documented() -> None:
    """A test that is skipped for want of a variable that no document names is never run."""
    reading = re.compile(r"(?:environ(?:\.get\(|\[)|variable\()\"(NVILA_\w+)\"")
    read = {name for path in (ROOT / "tests").rglob("*.py") for name in reading.findall(path.read_text())}
    documented = set(re.findall(r"^\| `(NVILA_\w+)`", _text("docs/environment.md"), flags=re.MULTILINE))
    assert environment.OF_TESTS <= read <= documented


def test_versions_are_those_of_the_locks() -> None:
    """Numbers were measured with the versions that are named beside them."""
    locked = {line for lock in (ROOT / "requirements").glob("*.lock") for line in lock.read_text().splitlines()}
    named = re.findall(r"`([\w-]+==[\w.]+)`", README)
    assert named
    assert [name for name in named if name not in locked] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_are_plain(document: str) -> None:
    """Praise says nothing, a placeholder promises, and a path of somebody's machine helps nobody else."""
    text = _text(document)
    found = re.findall(rf"\b(?:{FORBIDDEN})\b", text, flags=re.IGNORECASE)
    assert found == []
    # /opt/nvila and /opt/serve lie in the images, /var/lib/nvila on the nodes of a cluster.
    somewhere = r"(?<![\w.~$/}])/(?:home|root|Users|mnt|work|tmp|opt(?!/nvila|/serve)|var(?!/lib/nvila/))/\S*"
    assert re.findall(somewhere, text) == []


def test_the_licence_is_the_whole_text() -> None:
    """A shortened or edited licence is another licence."""
    digest = hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest()
    assert digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
