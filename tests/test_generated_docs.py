"""Pages of docs/ that are generated from the code are up to date."""

import importlib.util
from pathlib import Path

import pytest

from cipo_jax.config import Config, flatten

DOCS = Path(__file__).parents[1] / "docs"


def _generate():
    spec = importlib.util.spec_from_file_location("generate_docs", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATE = _generate()


@pytest.mark.parametrize("name", GENERATE.PAGES)
def test_a_generated_page_is_that_of_the_code(name):
    written = (DOCS / name).read_text(encoding="utf-8")
    assert written == GENERATE.PAGES[name](), "run python docs/generate.py"
    assert GENERATE.HEADER in written


def test_every_setting_is_in_the_page():
    page = (DOCS / "config.md").read_text(encoding="utf-8")
    for key in flatten(Config()):
        group, _, name = f"config.{key}".rpartition(".")
        heading = next(
            line for line in page.splitlines()
            if line.startswith("## ") and group in line[3:].split(", ")
        )  # fmt: skip
        section = page.split(f"{heading}\n", 1)[1].split("\n## ", 1)[0]
        assert f"\n| `{name}` | " in section, key


def test_check_fails_where_a_page_is_stale(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(GENERATE, "DOCS", tmp_path)
    monkeypatch.setattr(GENERATE, "PAGES", {"a.md": lambda: "text\n"})
    assert GENERATE.main(["--check"]) == 1
    assert "docs/a.md: is not up to date" in capsys.readouterr().out
    assert GENERATE.main([]) == 0
    assert (tmp_path / "a.md").read_text() == "text\n"
    assert GENERATE.main(["--check"]) == 0
