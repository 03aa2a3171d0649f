"""``pretrain``: makes the tiny world, its tokenizer and its two models from nothing."""

import json
from pathlib import Path

from cipo_jax.commands.flags import exit_for_help, parse_flags

HELP = """Writes world.json, target/ and retrained/ (Hugging Face folders) under --out. Those that
ship were made with `--config=configs/tiny/pretrain.py --out=cipo_jax/assets/tiny_lrm`. A stopped
run goes on from its last checkpoint, kept in --out/.checkpoints until the end."""

FLAGS = {"out": "the folder to write"}


def run(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    exit_for_help("pretrain", argv, HELP, FLAGS)
    from cipo_jax.config import PretrainConfig

    config, flags = parse_flags(
        PretrainConfig,
        "pretrain",
        argv,
        HELP,
        strings=FLAGS,
        needs=("config", "out"),
    )
    from cipo_jax.experiments.pretrain import make_models
    from cipo_jax.models.pretrained import NEVER_SAW
    from cipo_jax.progress import Reporter

    out = Path(flags.out)
    never_saw = make_models(config, out, Reporter())
    (out / "retrained" / NEVER_SAW).write_text(json.dumps(never_saw, indent=1) + "\n")
    print(f"wrote {out}: world.json, target/, retrained/ (never saw {', '.join(never_saw)})")
    return 0
