"""Paths of models and data: in the package, in a folder, or on the Hugging Face hub."""

import os
import re
from importlib import resources
from pathlib import Path

from cipo_jax.errors import UserError
from cipo_jax.typing import Tokenizer

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
# Neither pickled files nor weights in a second layout are downloaded.
_WANTED = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
_UNWANTED = ["original/*", "consolidated*", "onnx/*"]


def resolve(path: str) -> Path:
    """The local folder or file of a path in the config.

    Args:
      path: "asset:NAME" for one inside the package; a local path; or, where no such path exists,
        "OWNER/NAME" or "OWNER/NAME@REVISION" of the Hugging Face hub, which is downloaded into the
        hub's cache unless it is there.

    Raises:
      UserError: where the download fails.
    """
    if path.startswith("asset:"):
        return Path(str(resources.files("cipo_jax"))) / "assets" / path.removeprefix("asset:")
    local = Path(path).expanduser()
    if local.exists() or not _HUB_NAME.fullmatch(path) or path.startswith("."):
        return local
    return _download(path)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=_WANTED,
                ignore_patterns=_UNWANTED,
            )
        )
    except Exception as error:  # The hub's client raises many types for a failed download.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = lines[0] if lines else type(error).__name__
        offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
        hint = "; HF_HUB_OFFLINE is set" if offline else ""
        raise UserError(
            f"{name}: no such folder here, and the hub did not give it ({why}){hint}"
        ) from None


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model folder; custom code in the folder is never run.

    Raises:
      UserError: where it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # The parsers of transformers raise many types.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = lines[0] if lines else type(error).__name__
        raise UserError(f"{folder}: its tokenizer cannot be read: {why}") from None
