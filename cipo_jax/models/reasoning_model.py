"""A reasoning model as one value: its shape, how it is computed, and its text format."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from cipo_jax import hub
from cipo_jax.models import safetensors_io
from cipo_jax.models.decoder import Compute, DecoderConfig
from cipo_jax.models.hf_config import Fields, read_config, read_fields, read_object
from cipo_jax.text.chat_format import ChatFormat
from cipo_jax.typing import Params

NEVER_SAW = "never_saw.json"


@dataclasses.dataclass(frozen=True)
class ReasoningModel:
    """Everything about a model but its weights.

    Attributes:
      folder: the Hugging Face folder it came from.
      config: its shape.
      fields: its config.json, kept for export.
      generation: its generation_config.json, kept for export; None where it has none.
      format: tokenizer and think template.
    """

    folder: Path
    config: DecoderConfig
    fields: Fields
    generation: Fields | None
    format: ChatFormat

    @classmethod
    def open(cls, path: str, think: Any = None) -> "ReasoningModel":
        """Reads config and tokenizer of a Hugging Face folder or hub name; no weights yet.

        Args:
          path: see `hub.resolve`.
          think: a config.ThinkConfig; None for its defaults.
        """
        folder = hub.resolve(path)
        fields = read_fields(folder)
        config = read_config(folder)
        generation = _read_generation(folder)
        tokenizer = hub.load_tokenizer(folder)
        stops = [fields.get("eos_token_id"), (generation or {}).get("eos_token_id")]
        stop_ids = [i for s in stops for i in (s if isinstance(s, list) else [s]) if i is not None]
        settings = {} if think is None else dataclasses.asdict(think)
        format = ChatFormat(tokenizer, stop_ids=tuple(dict.fromkeys(stop_ids)), **settings)
        return cls(folder, config, fields, generation, format)

    def load_params(self, shardings: Params = None, dtype: str = "float32") -> Params:
        """Reads the weights into the training layout."""
        return safetensors_io.load_params(self.folder, self.config, shardings, dtype)

    def fingerprint(self) -> str:
        """Changes when the folder's config, tokenizer or weights do."""
        return fingerprint(self.folder)

    def never_saw(self) -> list[str] | None:
        """People of the tiny world that a retrained model was never shown; None if not told."""
        path = self.folder / NEVER_SAW
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def save(self, folder: str | Path, params: Params, dtype: str = "float32") -> None:
        """Writes weights, config and tokenizer as a Hugging Face folder."""
        safetensors_io.save_folder(
            folder,
            self.config,
            params,
            self.format.tokenizer,
            self.fields,
            dtype,
            self.generation,
        )


def _read_generation(folder: Path) -> Fields | None:
    path = folder / "generation_config.json"
    return read_object(path) if path.is_file() else None


def fingerprint(folder: Path) -> str:
    """Changes when a folder's config, tokenizer or weights do.

    Of each file the size and the first and last MiB count, so that a large model does not have to
    be read twice.
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


def compute_of(model_config: Any, *, decoding: bool = False) -> Compute:
    """The `Compute` that a config.ModelConfig asks for, to train or to decode."""
    return Compute(
        dtype=model_config.decode_dtype if decoding else model_config.dtype,
        remat=model_config.remat,
        attention=model_config.attention,
        logits_chunk=model_config.logits_chunk,
    )
