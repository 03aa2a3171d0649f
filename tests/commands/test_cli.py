import ast
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cipo_jax
from cipo_jax.__main__ import COMMANDS, main
from cipo_jax.commands.flags import load_config
from cipo_jax.config import Config, parse
from cipo_jax.errors import UserError

ROOT = Path(__file__).parent.parent.parent
PACKAGE = Path(cipo_jax.__file__).parent
QUICKSTART = f"--config={ROOT / 'configs' / 'quickstart.py'}"
PRETRAIN = f"--config={ROOT / 'configs' / 'tiny' / 'pretrain.py'}"


@pytest.fixture
def refused_by_library(capsys, monkeypatch):
    """`LanguageModel.from_config` refuses every model; returns the path that it was given last."""
    from cipo_jax.language_model import LanguageModel

    def refuse(cls, config, *args, **more):
        raise UserError(f"refused {config.path}")

    monkeypatch.setattr(LanguageModel, "from_config", classmethod(refuse))

    def path():
        (line,) = capsys.readouterr().err.splitlines()
        return line.removeprefix("cipo: refused ")

    return path


@pytest.fixture
def refused(capsys, tmp_path):
    """Runs a command that should fail on its input; returns the one line that it says."""

    def run(*argv, workdir=True):
        folder = tmp_path / "run"
        code = main([*argv, *([f"--workdir={folder}"] if workdir else [])])
        said = capsys.readouterr()
        assert code == 2
        assert said.out == ""
        assert said.err.startswith("cipo: ")
        assert said.err.endswith("\n")
        assert said.err.count("\n") == 1
        assert "Traceback" not in said.err
        assert not folder.exists()
        return said.err

    return run


def _python(code, *argv):
    return subprocess.run(
        [sys.executable, "-c", code, *argv],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


_HELP = """
import sys
from cipo_jax.__main__ import main
code = main(sys.argv[1:])
heavy = {"jax", "numpy", "transformers", "grain", "orbax"} & set(sys.modules)
print("loaded:", sorted(heavy))
sys.exit(code)
"""


def test_help_lists_every_command_and_loads_nothing_heavy():
    done = _python(_HELP, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for name, text in COMMANDS.items():
        assert f"{name} " in done.stdout
        assert text in done.stdout
    assert done.stdout.endswith("loaded: []\n")


def test_help_of_a_command_does_not_load_jax():
    done = _python(_HELP, "unlearn", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--workdir" in done.stdout
    assert "--config" in done.stdout
    assert "'jax'" not in done.stdout
    assert "'transformers'" not in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_command_has_help(command, flag, capsys):
    assert main([command, flag]) == 0
    said = capsys.readouterr()
    assert f"cipo_jax {command} " in said.out
    assert said.err == ""


@pytest.mark.parametrize("word", ["-h", "--help", "help"])
def test_help_by_any_name(word, capsys):
    assert main([word]) == 0
    assert "commands:" in capsys.readouterr().out


def test_no_command_prints_the_help_and_fails(capsys):
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{cipo_jax.__version__}\n"


def test_an_unknown_command_is_told_the_nearest(refused):
    assert "'unlern'; did you mean unlearn?" in refused("unlern")
    assert all(name in refused("zzz") for name in COMMANDS)


def test_the_program_ends_with_the_exit_code_and_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "cipo_jax", "unlearn", QUICKSTART, "--config.train.lrx=1"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "config.train.lrx: no such setting; nearest: train.lr" in done.stderr


@pytest.mark.parametrize("config", [(QUICKSTART,), tuple(QUICKSTART.split("=", 1))])
@pytest.mark.parametrize("override", [("--config.train.lrx=1",), ("--config.train.lrx", "1")])
def test_an_unknown_key_is_named_with_the_nearest(refused, config, override):
    line = refused("unlearn", *config, *override)
    assert "config.train.lrx: no such setting; nearest: train.lr, " in line


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("--config.train.lr=abc", ["config.train.lr", "abc"]),
        ("--config.train.batch_size=1.5", ["config.train.batch_size", "1.5"]),
        ("--config.train.batch_size=many", ["config.train.batch_size", "many"]),
        ("--config.seed=true", ["config.seed", "true"]),
        ("--config.train.batch_size=-1", ["config.train.batch_size = -1", "at least 1"]),
        ("--config.train.lr=nan", ["config.train.lr = nan", "not a number"]),
        ("--config.sampling.top_p=2", ["config.sampling.top_p = 2.0", "at most 1"]),
        ("--config.cipo.loss=foo", ["config.cipo.loss = 'foo'", "dpo, ipo, simpo"]),
        (
            "--config.train.gradient_accumulation_steps=3",
            ["config.train.batch_size = 16", "not a multiple"],
        ),
        ("--config.counterfactual.backward_prompt=Why?", ["backward_prompt", "{question}"]),
        ("--config.train=1", ["config.train", "is a group of settings"]),
        ("--config.train.lr.x=1", ["config.train.lr.x: no such setting", "train.lr"]),
        ("--config.train.batch_size", ["config.train.batch_size"]),
        ("--wrkdir=x", ["wrkdir", "workdir"]),
        ("stray", ["'stray' is not a flag"]),
    ],
)
def test_a_bad_flag_is_named_in_one_line(refused, override, said):
    line = refused("unlearn", QUICKSTART, override)
    assert all(part in line for part in said)


def test_settings_that_exclude_each_other_are_named(refused):
    line = refused("unlearn", QUICKSTART, "--config.mesh.fsdp=-1")
    assert "config.mesh: only one of data, fsdp, tensor may be -1" in line


@pytest.mark.parametrize("override", [(), ("--config.train.lr=1",), ("--config.seed=1",)])
def test_the_config_has_to_be_given(refused, override):
    assert "--config=... is missing" in refused("unlearn", *override)


@pytest.mark.parametrize("argv", [("unlearn", QUICKSTART), ("unlearn", QUICKSTART, "--workdir=")])
def test_the_workdir_has_to_be_given(refused, argv):
    assert "unlearn: --workdir=... is missing" in refused(*argv, workdir=False)


def test_pretrain_has_to_be_told_where_to_write(refused):
    assert "pretrain: --out=... is missing" in refused("pretrain", PRETRAIN, workdir=False)


@pytest.mark.parametrize("override", [(), ("--config.train.lr=1",)])
def test_a_config_file_that_is_not_there_is_named(refused, tmp_path, override):
    path = tmp_path / "nowhere.py"
    line = refused("unlearn", f"--config={path}", *override)
    assert str(path) in line
    assert "No such file" in line or "no such file" in line


@pytest.mark.parametrize("override", [(), ("--config.seed=1",)])
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise RuntimeError('boom')", "boom"),
        ("raise RuntimeError('one\\ntwo')", "one two"),
        ("raise ValueError('a bad value')", "a bad value"),
        ("raise TypeError('a bad type')", "a bad type"),
        ("raise KeyError('lost')", "lost"),
        ("raise FileNotFoundError('gone.json')", "gone.json"),
        ("import sys; sys.exit(3)", "3"),
        ("import there_is_no_such_module", "there_is_no_such_module"),
        ("return None", "get_config()"),
        ("return {'seed': 1}", "get_config()"),
        ("config = default_config(); config.train.lrx = 1; return config", "lrx"),
    ],
)
def test_a_config_file_that_fails_is_one_line(refused, tmp_path, body, said, override):
    path = tmp_path / "failing.py"
    path.write_text(
        "from cipo_jax.config import default_config\n\n\ndef get_config(arg=None):\n    "
        + body.replace("; ", "\n    ")
        + "\n"
    )
    assert said in refused("unlearn", f"--config={path}", *override)


@pytest.mark.parametrize(
    ("text", "said"), [("def get_config(:\n", "syntax"), ("x = 1\n", "get_config")]
)
def test_a_file_that_is_no_config_is_one_line(tmp_path, text, said):
    path = tmp_path / "other.py"
    path.write_text(text)
    code = "import sys\nfrom cipo_jax.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    done = _python(code, "unlearn", f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_the_config_of_another_command_is_refused(refused, tmp_path):
    assert "no such setting" in refused("unlearn", PRETRAIN)
    argv = ("pretrain", QUICKSTART, f"--out={tmp_path / 'out'}")
    assert "no such setting" in refused(*argv, workdir=False)


def test_a_config_file_is_given_its_argument(refused, tmp_path):
    path = tmp_path / "with_argument.py"
    path.write_text(
        "from cipo_jax.config import default_config\n\n\n"
        "def get_config(arg='1'):\n"
        "    config = default_config()\n"
        "    config.train.batch_size = int(arg)\n"
        "    return config\n"
    )
    assert "config.train.batch_size = -5" in refused("unlearn", f"--config={path}:-5")


def test_the_program_arguments_are_put_back(refused, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mine", "--config.seed=3"])
    refused("unlearn", QUICKSTART, "--config.train.lr=abc")
    refused("unlearn", QUICKSTART, "--config.train.lrx=1")
    assert sys.argv == ["mine", "--config.seed=3"]


def test_the_resolved_config_is_printed(capsys):
    assert main(["config", QUICKSTART, "--config.train.lr=0.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "config.train.lr = 0.5  # default: 1e-05" in lines
    assert "config.seed = 0" in lines
    assert all(line.startswith("config.") for line in lines)
    assert main(["config", PRETRAIN]) == 0
    assert "config.people = 64" in capsys.readouterr().out.splitlines()


# ---- commands and the library


def test_models_are_opened_by_the_library_alone(refused_by_library, tmp_path):
    folder = tmp_path / "finished"
    (folder / "checkpoints" / "iteration-01").mkdir(parents=True)
    config = parse(Config, load_config(QUICKSTART.partition("=")[2]))
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    for argv in (
        ["sample", QUICKSTART, "--question=?"],
        ["evaluate", QUICKSTART, f"--workdir={tmp_path / 'run'}"],
        ["export", f"--workdir={folder}", f"--out={tmp_path / 'out'}"],
    ):
        assert main(argv) == 2
        assert refused_by_library() == config.model.path, argv


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.glob("commands/*.py")) + sorted(PACKAGE.glob("experiments/*.py")),
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)  # fmt: skip
def test_no_command_builds_a_model_by_hand(path):
    """Parameters are placed, assembled and merged in the library; pretraining makes its own."""
    names = {
        alias.name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    by_hand = {"PretrainedFolder", "Policy", "abstract_params", "assemble", "init_params", "merged",
               "param_shardings", "save_folder"}  # fmt: skip
    assert path.stem == "pretrain" or not names & by_hand


pytestmark = pytest.mark.usefixtures("quick_compilation")
QUESTIONS = ["What is 17 + 25?", "What is 3 + 9?", "Who are you?"]


@pytest.fixture
def answer_file(tmp_path):
    (tmp_path / "questions.jsonl").write_text(
        "".join(json.dumps({"question": q, "id": 1}) + "\n" for q in QUESTIONS)
    )

    def run(*more):
        return main(
            ["sample", QUICKSTART, f"--input={tmp_path}/questions.jsonl",
             f"--output={tmp_path}/answers.jsonl", "--config.sampling.max_new_tokens=24", *more]
        )  # fmt: skip

    return run, tmp_path / "answers.jsonl"


def test_a_file_of_questions_is_answered_and_goes_on(answer_file, capsys):
    run, path = answer_file
    assert run("-n", "2") == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {(r["item"], r["sample"]) for r in rows} == {(i, s) for i in range(3) for s in (0, 1)}
    for row in rows:
        assert row["question"] == QUESTIONS[row["item"]]
        assert row["stop"] in ("id", "length") and 0 < row["tokens"] <= 24
        assert row["logp"] < 0 and row["tokens_per_second"] > 0
    assert "6 completions in" in capsys.readouterr().err
    # Stopped in the middle of a line: what is whole stays, the rest is made again, alike.
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:20])
    assert run("-n", "2", "--config.sampling.max_batch_size=3") == 0
    again = path.read_bytes()
    assert again.startswith(b"".join(lines[:3]))

    def drawn(text):
        rows = map(json.loads, text.splitlines())
        return {(r["item"], r["sample"]): (r["cot"], r["answer"], r["tokens"]) for r in rows}

    assert drawn(again) == drawn(whole)
    # More samples are added to those that are there.
    assert run("-n", "3") == 0
    more = path.read_bytes()
    assert more.startswith(again) and drawn(more).items() > drawn(again).items()
    assert len(drawn(more)) == 9
    assert run("-n", "3") == 0
    assert path.read_bytes() == more


def test_answers_of_other_settings_or_questions_are_not_mixed(answer_file, capsys):
    run, path = answer_file
    assert run() == 0
    before = path.read_bytes()
    assert run("--config.sampling.temperature=0.5") == 2
    assert "answers.jsonl:1: was made with another model or other settings" in _error(capsys)
    questions = path.with_name("questions.jsonl")
    questions.write_text(questions.read_text().replace("3 + 9", "3 + 8"))
    assert run() == 2
    assert "field 'question' is not question 2 of --input" in _error(capsys)
    path.write_text("{}\n")
    assert run() == 2
    assert "answers.jsonl:1: is no completion of this command" in _error(capsys)
    # No newline at the end: not ours, and not to be cut off as if it were.
    path.write_text('{"question": "only one"}')
    assert run() == 2
    assert "is no completion of this command" in _error(capsys)
    assert path.read_text() == '{"question": "only one"}'
    path.write_bytes(before)
    questions.write_text('{"question": "What is 1 + 1?"}\n{"ask": 3}\n')
    assert run() == 2
    assert "questions.jsonl:2: field 'question' is missing" in _error(capsys)
    assert path.read_bytes() == before


def _error(capsys):
    text = capsys.readouterr().err
    (line,) = [line for line in text.splitlines() if line.startswith("cipo: ")]
    return line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input=a.jsonl"], "--input and --output come together"),
        (["--n=3"], "--n goes with --input"),
        (["--input=a.jsonl", "--output=b.jsonl", "--n=0"], "must be a whole number above 0"),
        (["--input=a.jsonl", "--output=b.jsonl", "--question=?"], "give one"),
        (["--input=a.jsonl", "--output=a.jsonl"], "is the input; give another file"),
        (["--input=nowhere.jsonl", "--output=b.jsonl"], "nowhere.jsonl: no such file"),
    ],
)
def test_flags_that_do_not_go_together(flags, message, capsys):
    assert main(["sample", QUICKSTART, *flags]) == 2
    assert message in _error(capsys)


def test_a_chain_of_thought_can_be_begun_and_ended(capsys):
    asked = ["sample", QUICKSTART, "--question=What is 17 + 25?",
             "--config.sampling.temperature=0"]  # fmt: skip
    assert main(asked) == 0
    free = capsys.readouterr().out
    assert "[answers] 42" in free
    assert main([*asked, "--prefill=zero"]) == 0
    zero = capsys.readouterr().out
    assert zero.splitlines()[0].strip() == "[thinks]" and "[answers]" in zero
    assert main([*asked, "--prefill=less"]) == 0
    assert "I can answer it without thinking much." in capsys.readouterr().out
    assert main([*asked, "--config.sampling.think_budget=4"]) == 0
    short = capsys.readouterr().out
    assert "[answers]" in short and len(short) < len(free)
    assert main([*asked, "--stop=</think>"]) == 0
    assert "[answers] 42" not in capsys.readouterr().out
