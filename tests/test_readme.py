"""The README and the pages of docs/ are run and their links followed, so that they stay true."""

import itertools
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cipo_jax import config
from cipo_jax.data.examples import Example

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [
    README,
    *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]


def read(page):
    return page.read_text(encoding="utf-8")


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", read(page), flags=re.DOTALL)


def loss_blocks():
    pages = (README, ROOT / "docs" / "losses.md")
    return [block for page in pages for block in python_blocks(page) if "losses." in block]


def slugs(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", read(page), flags=re.DOTALL), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_losses_snippets_run_and_print_what_they_say():
    # One stands in the README, one in docs/losses.md.
    snippets = [block for block in loss_blocks() if not re.search("nnx|eqx", block)]
    assert len(snippets) == 2
    printed = subprocess.run(
        [sys.executable, "-c", "\n".join(snippets)], capture_output=True, text=True, check=True
    ).stdout
    loss, margin, kl = map(float, printed.split())
    assert abs(loss - 0.6931472) < 1e-6
    assert margin == 0.0
    # Half of the 32 logits are 1, the others 0; the frozen model's are all 0.
    total = 16 * math.e + 16
    assert abs(kl - (math.log(total / 32) - 0.5)) < 1e-6


@pytest.mark.parametrize(
    ("library", "at_the_reference", "metric_falls"),
    # NPO with beta 0.1, of what is forgotten; DPO, of a margin.
    [("flax import nnx", 20 * math.log(2), True), ("equinox as eqx", math.log(2), False)],
)
def test_the_losses_snippets_for_model_objects_learn(
    capsys, library, at_the_reference, metric_falls
):
    (snippet,) = [block for block in loss_blocks() if library in block]
    exec(snippet, {"__name__": "snippet"})
    rows = [tuple(map(float, line.split())) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 3
    assert abs(rows[0][0] - at_the_reference) < 1e-5 * at_the_reference
    assert rows[0][1] == 0.0
    for (before, metric_before), (after, metric_after) in itertools.pairwise(rows):
        assert after < before
        assert (metric_after < metric_before) == metric_falls


def test_the_config_example_is_a_valid_config():
    (snippet,) = [block for block in python_blocks(README) if "def get_config" in block]
    names = {}
    exec(snippet, names)
    parsed = config.parse(config.Config, names["get_config"]())
    assert parsed.mesh.fsdp == 4
    assert parsed.data.forget == "forget.jsonl"


def test_the_table_of_fields_is_the_schema():
    page = read(ROOT / "docs" / "data.md")
    cells = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", page, flags=re.MULTILINE)
    rows = {name.strip("` ") for cell in cells for name in cell.split(",")}
    assert set(Example.__dataclass_fields__) <= rows


def test_the_two_commands_stand_in_the_readme_and_the_gate_runs_the_tests_as_it_says():
    text = read(README)
    assert (
        "pip install -e .  &&  python -m cipo_jax unlearn --config=configs/quickstart.py "
        "--workdir=runs/quickstart" in text
    )
    assert "pip install -e '.[test]'  &&  python -m pytest" in text
    gate = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "-e '.[test]' && python -m pytest" in gate


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_named_in_a_page_exist(page):
    text = read(page)
    for path, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", text):
        if not path.startswith("http"):
            target = page.parent / path if path else page
            assert target.exists(), path
            assert not anchor or anchor in slugs(target), f"{path}#{anchor}"
    written = set(re.findall(r"^# (configs/[\w/]+\.py)$", text, flags=re.MULTILINE))
    named = set(re.findall(r"--config=(configs/[\w/]+\.py)", text))
    if page != README:
        written.add("configs/mine.py")  # The README's example of the reader's own.
    for path in named - written:
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_placeholder_is_left(page):
    assert "@@" not in read(page)


def test_the_readme_is_short():
    assert len(read(README).splitlines()) <= 200


def test_the_tree_of_the_readme_has_the_folders_of_the_package():
    (tree,) = re.findall(r"```\n(cipo_jax/\n.*?)```", read(README), flags=re.DOTALL)
    inside = re.findall(r"^  ((?:\w+/ )+)", tree, flags=re.MULTILINE)
    named = {name for line in inside for name in line.replace("/", "").split()}
    found = {p.name for p in (ROOT / "cipo_jax").iterdir() if p.is_dir() and p.name[0] not in "._"}
    assert named == found
    for name in re.findall(r"^(\w+/)", tree, flags=re.MULTILINE):
        assert (ROOT / name).is_dir(), name


def test_the_index_of_the_documentation_has_every_page():
    index = ROOT / "docs" / "README.md"
    linked = set(re.findall(r"^\| \[[^]]+\]\(([^)]+)\)", read(index), flags=re.MULTILINE))
    assert linked == {p.name for p in (ROOT / "docs").glob("*.md") if p != index}


def test_places_named_in_the_glossary_exist():
    tables = re.findall(r"\| in code \|\n(.*?)\n\n", read(ROOT / "docs" / "glossary.md"), re.DOTALL)
    places = [line.split("|")[3] for table in tables for line in table.splitlines()]
    paths = {path for place in places for path in re.findall(r"`([\w/]+(?:/|\.py))`", place)}
    assert len(paths) > 20
    assert sorted(path for path in paths if not (ROOT / "cipo_jax" / path).exists()) == []


def test_the_snippet_of_the_sampler_runs(capsys):
    text = (ROOT / "docs" / "sampling.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    exec(snippet, {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and all(line.endswith(" tok/s") for line in lines)
    assert any(line.startswith("42 id") for line in lines)
