"""A pretrained model on disk: a Hugging Face folder with config, tokenizer and weights."""

import dataclasses
import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from cipo_jax import hub
from cipo_jax.models.decoder import Compute, DecoderConfig
from cipo_jax.models.hf_config import read_config
from cipo_jax.models.hf_fields import Fields, read_fields, read_object
from cipo_jax.models.safetensors_load import load_params
from cipo_jax.models.safetensors_save import save_folder
from cipo_jax.typing import Params, Tokenizer

if TYPE_CHECKING:
    from cipo_jax.shared_config import ModelConfig

# Lists the people of the tiny world that a retrained model was not trained on.
NEVER_SAW = "never_saw.json"


@dataclasses.dataclass(frozen=True)
class PretrainedFolder:
    """A Hugging Face folder: its config is read, its tokenizer and weights are loaded on request.

    Attributes:
      folder: path of the folder.
      config: architecture of the model.
      fields: contents of config.json, written again by `save`.
      generation: contents of generation_config.json, written again by `save`; None where the folder
        has no such file.
    """

    folder: Path
    config: DecoderConfig
    fields: Fields
    generation: Fields | None

    @classmethod
    def open(cls, path: str) -> "PretrainedFolder":
        """Reads config.json and generation_config.json of a folder.

        Args:
          path: a folder, "asset:NAME", or a name of the Hugging Face hub; see `hub.resolve`.

        Raises:
          UserError: where the folder does not exist, or its config is not supported.
        """
        folder = hub.resolve(path)
        generation = folder / "generation_config.json"
        return cls(
            folder,
            read_config(folder),
            read_fields(folder),
            read_object(generation) if generation.is_file() else None,
        )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The folder's Hugging Face tokenizer; raises UserError where it cannot be read."""
        return hub.load_tokenizer(self.folder)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Token ids that end a generation: `eos_token_id` of both config files, each id once."""
        stops = [fields.get("eos_token_id") for fields in (self.fields, self.generation or {})]
        ids = [i for s in stops for i in (s if isinstance(s, list) else [s]) if i is not None]
        return tuple(dict.fromkeys(ids))

    def load_params(self, shardings: Params = None, dtype: str = "float32") -> Params:
        """Reads the weights into the training layout; see `safetensors_load`."""
        return load_params(self.folder, self.config, shardings, dtype)

    def save(
        self,
        folder: str | Path,
        params: Params,
        tokenizer: Tokenizer | None = None,
        dtype: str = "float32",
    ) -> None:
        """Writes weights, config and tokenizer as a Hugging Face folder, atomically.

        Args:
          folder: path to write to; an existing folder is replaced.
          params: training layout, without adapters.
          tokenizer: a Hugging Face tokenizer; None for that of this folder.
          dtype: of the stored weights.
        """
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        save_folder(folder, self.config, params, tokenizer, self.fields, dtype, self.generation)

    def fingerprint(self) -> str:
        """A hash of the folder's config, tokenizer and weights; see `fingerprint`."""
        return fingerprint(self.folder)

    def never_saw(self) -> list[str] | None:
        """People that the model was not trained on; None where the folder has no such list."""
        path = self.folder / NEVER_SAW
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def fingerprint(folder: Path) -> str:
    """A hash that changes when the config, the tokenizer or the weights of a folder change.

    It covers the size and the first and last MiB of each file, so that a large model is not read
    twice.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".json", ".jinja", ".model", ".safetensors"):
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as f:
            digest.update(f.read(2**20))
            if size > 2**20:
                f.seek(-(2**20), 2)
                digest.update(f.read())
    return digest.hexdigest()[:16]


def compute_from_config(model_config: "ModelConfig", decoding: bool = False) -> Compute:
    """The `Compute` that `config.model` asks for, for training or for decoding."""
    return Compute(
        dtype=model_config.decode_dtype if decoding else model_config.dtype,
        remat=model_config.remat,
        attention=model_config.attention,
        logits_chunk=model_config.logits_chunk,
    )
