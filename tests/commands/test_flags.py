"""Overrides on the command line, and the `config` command; nothing is run."""

import pytest

from cipo_jax.commands import config as config_command
from cipo_jax.commands.flags import load_config, parse_flags
from cipo_jax.config import Config, PretrainConfig, Variant, default_config, parse
from cipo_jax.errors import UserError, exit_code

BODY = """
from cipo_jax.config import default_config


def get_config(arg=None):
    config = default_config()
    config.train.lr = 3e-4
    config.fixed_target.retain_weight = 5.0
    {more}
    return config
"""


@pytest.fixture
def config_file(tmp_path):
    """Writes a config file with more lines; returns the flag that names it."""

    def write(more="pass", name="config.py"):
        path = tmp_path / name
        path.write_text(BODY.format(more=more.replace("; ", "\n    ")))
        return f"--config={path}"

    return write


def read(*argv, cls=Config):
    return parse_flags(cls, "test", argv, "help")[0]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--config.train.lr=1"], {"train.lr": 1.0}),
        (["--config.train.lr", "1"], {"train.lr": 1.0}),
        (["-config.train.lr=1"], {"train.lr": 1.0}),
        (["--config.train.lr=1", "--config.train.lr=2"], {"train.lr": 2.0}),
        (["--config.mesh.fsdp", "-1", "--config.mesh.data=1"], {"mesh.fsdp": -1, "mesh.data": 1}),
        (["--config.lora.rank_stabilized"], {"lora.rank_stabilized": True}),
        (["--config.lora.rank_stabilized=true"], {"lora.rank_stabilized": True}),
        (["--config.sequence.replay=false"], {"sequence.replay": False}),
        (["--noconfig.sequence.replay"], {"sequence.replay": False}),
        (["--config.npo.beta=2"], {"npo.beta": 2.0}),
        (["--config.fixed_target.retain_weight=None"], {"fixed_target.retain_weight": None}),
        (["--config.fixed_target.retain_weight=0"], {"fixed_target.retain_weight": 0.0}),
        (["--config.forget.people=Ada Brandt, Hugo Vance"],
         {"forget.people": ("Ada Brandt", "Hugo Vance")}),
        (["--config.forget.people=('Ada Brandt',)"], {"forget.people": ("Ada Brandt",)}),
        (["--config.representation.layers=1,2"], {"representation.layers": (1, 2)}),
        (["--config.compare.lrs=1e-3,1e-2"], {"compare.lrs": (1e-3, 1e-2)}),
        (["--config.compare.variants=(('x', {'seed': 1}),)"],
         {"compare.variants": (Variant("x", (("seed", 1),)),)}),
        (["--config.think.prompt=a=b {question}"], {"think.prompt": "a=b {question}"}),
    ],
)  # fmt: skip
def test_overrides_have_the_type_of_their_setting(config_file, capsys, argv, expected):
    plain, changed = read(config_file()), read(config_file(), *argv)
    for key, value in expected.items():
        group, name = key.split(".")
        assert getattr(getattr(changed, group), name) == value
    assert plain.train.lr == 3e-4
    assert plain.fixed_target.retain_weight == 5.0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("--config.train.lr=abc", "config.train.lr = 'abc': must be of type float"),
        ("--config.npo.beta=none", "config.npo.beta = 'none': must be of type float or None"),
        ("--config.cipo.beta=abc", "config.cipo.beta = 'abc': must be of type float or None"),
        ("--config.compare.lrs=0", "config.compare.lrs[0] = 0.0: must be above 0"),
        ("--config.baseline=1", "config.baseline: no such setting; nearest: "),
        ("--config.train.batch=1.5", "config.train.batch_size = '1.5': must be of type int"),
        ("--config.fixed_target.retain=kll", "must be one of none, nll, kl, kd, hidden, or None"),
        ("--noconfig.train.lr", "config.train.lr = 'false': must be of type float"),
    ],
)
@pytest.mark.filterwarnings("ignore::cipo_jax.settings.RenamedSetting")
def test_a_wrong_override_is_named(config_file, override, said):
    with pytest.raises(UserError) as caught:
        read(config_file(), override)
    assert said in str(caught.value)


def test_old_keys_warn_in_one_line_each(config_file, capsys):
    config = read(
        config_file("config.train.batch = 8; config.baseline.rounds = 3"),
        "--config.train.batch=4",
        "--config.baseline.retain_weight=0",
        "--config.baseline.beta=0.5",
        "--config.baseline.layers=5-7",
        "--config.compare.lrs=2e-4; rmu, r2mu: 1e-3",
        "--config.compare.methods=all",
        "--config.cipo.beta=0",
    )
    assert (config.train.batch_size, config.fixed_target.rounds) == (4, 3)
    assert config.fixed_target.retain_weight is None
    assert config.npo.beta == config.distillation.beta == 0.5
    assert config.representation.layers == (5, 6, 7)
    assert config.compare.lrs == (2e-4,)
    assert [(r.rows, r.lrs) for r in config.compare.row_lrs] == [(("rmu", "r2mu"), (1e-3,))]
    assert (config.compare.methods, config.cipo.beta) == ((), None)
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert len(lines) == 8  # train.batch is warned of once.
    assert all(line.startswith("cipo: warning: config.") for line in lines)
    assert "config.train.batch is now config.train.batch_size" in lines[0]


def test_other_warnings_of_a_config_file_are_left_alone(config_file):
    with pytest.warns(UserWarning, match="mine"):
        read(config_file("import warnings; warnings.warn('mine')"))


def test_an_error_in_a_config_file_has_its_line(config_file):
    flag = config_file("raise RuntimeError('boom')")
    with pytest.raises(UserError) as caught:
        read(flag)
    path = flag.removeprefix("--config=")
    assert str(caught.value) == f"{path}:9: RuntimeError: boom"


def test_a_user_error_in_a_config_file_is_told_as_it_is(config_file):
    more = "from cipo_jax.errors import UserError; raise UserError('no such thing')"
    with pytest.raises(UserError, match=r"^no such thing$"):
        read(config_file(more))


def test_a_config_file_may_define_a_dataclass(config_file):
    more = "import dataclasses; C = dataclasses.make_dataclass('C', ['a']); C(1)"
    assert read(config_file(more)).train.lr == 3e-4


def test_a_plain_config_dict_will_do(tmp_path):
    path = tmp_path / "plain.py"
    path.write_text(
        "from ml_collections import ConfigDict\n\n\n"
        "def get_config():\n    return ConfigDict({'train': {'batch': 8, 'lr': 1e-3}})\n"
    )
    with pytest.warns(FutureWarning):
        assert parse(Config, load_config(str(path))).train.batch_size == 8
    assert read(f"--config={path}", "--config.train.batch_size=4").train.batch_size == 4


# ---- the config command


def run(*argv):
    return exit_code(lambda: config_command.run(list(argv)))


def test_the_resolved_config_is_printed_as_a_config_file_sets_it(config_file, capsys):
    override = "--config.compare.variants=(('x', {'cipo.nll_weight': 0.0}),)"
    assert run(config_file(), override, "--config.forget.people=Ada Brandt") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "config.train.lr = 0.0003  # default: 1e-05" in lines
    assert "config.fixed_target.retain_weight = 5.0  # default: None" in lines
    assert "config.forget.people = ('Ada Brandt',)  # default: ()" in lines
    assert "config.seed = 0" in lines
    variants = "config.compare.variants = (('x', {'cipo.nll_weight': 0.0}),)  # default: ()"
    assert variants in lines
    assert sum("# default:" in line for line in lines) == 4
    config = default_config()
    exec("\n".join(lines), {"config": config})  # It is what a config file may hold.
    assert parse(Config, config) == read(
        config_file(), override, "--config.forget.people=Ada Brandt"
    )


def test_the_config_of_pretrain_is_printed(tmp_path, capsys):
    path = tmp_path / "pretrain.py"
    path.write_text(
        "from cipo_jax.config import PretrainConfig, to_config_dict\n\n\n"
        "def get_config():\n    return to_config_dict(PretrainConfig())\n"
    )
    assert run(f"--config={path}", "--config.steps=7", "--config.train.batch=4") == 0
    said = capsys.readouterr()
    assert "config.steps = 7  # default: 3000" in said.out.splitlines()
    assert "config.train.batch_size = 4  # default: 16" in said.out.splitlines()
    assert said.err.count("\n") == 1
    assert type(read(f"--config={path}", cls=(Config, PretrainConfig))) is PretrainConfig


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "config: --config=... is missing"),
        (["--config=nowhere.py"], "--config=nowhere.py: no such file"),
        (["--confg=x.py"], "config"),
    ],
)
def test_the_config_command_names_what_is_missing(argv, said, capsys):
    assert run(*argv) == 2
    line = capsys.readouterr().err
    assert line.startswith("cipo: ") and line.count("\n") == 1
    assert said in line
