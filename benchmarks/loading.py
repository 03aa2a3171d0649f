"""What loading a checkpoint costs: host memory beyond the result, and time.

    python benchmarks/loading.py [--out FILE.json] [--folder DIR]

Writes a checkpoint of the shape of Llama-3.2-1B (2.5 GB in bfloat16, several files, random numbers)
into a temporary folder, and loads it in fresh processes: with this package into bfloat16 and into
float32 parameters on the CPU, and, where torch is, with transformers. Prints one table.

Memory is RssAnon: pages of the memory-mapped files are not anonymous, the kernel takes them back
when it wants them. It is sampled from outside the process that loads, every millisecond, since a
thread inside would wait for the very calls that it is to watch. The files have just been written,
so that they are read from the page cache: the speed is that of the loader, not of the disk.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
FILE_BYTES = 600 * 10**6
RUNS = [
    ("cipo_jax", "bfloat16"),
    ("cipo_jax", "float32"),
    ("transformers", "bfloat16"),
    ("transformers", "float32"),
]


def tensors():
    """Names and shapes, as they are stored."""
    V, D, F = (CONFIG[k] for k in ("vocab_size", "hidden_size", "intermediate_size"))
    K = CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
    yield "model.embed_tokens.weight", (V, D)
    for i in range(CONFIG["num_hidden_layers"]):
        for name, shape in (
            ("input_layernorm", (D,)),
            ("self_attn.q_proj", (D, D)),
            ("self_attn.k_proj", (K, D)),
            ("self_attn.v_proj", (K, D)),
            ("self_attn.o_proj", (D, D)),
            ("post_attention_layernorm", (D,)),
            ("mlp.gate_proj", (F, D)),
            ("mlp.up_proj", (F, D)),
            ("mlp.down_proj", (D, F)),
        ):
            yield f"model.layers.{i}.{name}.weight", shape
    yield "model.norm.weight", (D,)


def write_checkpoint(folder):
    """Writes the files byte by byte, as the format has them; returns how many bytes in all."""
    rng = np.random.default_rng(0)
    # The upper half of a float32 is a bfloat16.
    block = (rng.normal(scale=0.02, size=2**22).astype(np.float32).view(np.uint32) >> 16).astype(
        np.uint16
    )
    files, sizes = [[]], [0]
    for name, shape in tensors():
        size = 2 * int(np.prod(shape))
        if sizes[-1] and sizes[-1] + size > FILE_BYTES:
            files.append([])
            sizes.append(0)
        files[-1].append((name, shape, size))
        sizes[-1] += size
    where = {}
    for i, held in enumerate(files):
        path = folder / f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        header, at = {"__metadata__": {"format": "pt"}}, 0
        for name, shape, size in held:
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
            where[name] = path.name
            at += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for _, _, size in held:
                for start in range(0, size // 2, block.size):
                    f.write(block[: size // 2 - start])
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return sum(sizes), len(files)


def say(**values):
    print(json.dumps(values), flush=True)


def child(library, dtype, folder):
    """Loads in a process of its own: says when it is ready, waits, loads, says what it has."""
    if library == "cipo_jax":
        os.environ["JAX_PLATFORMS"] = "cpu"
        import jax

        from cipo_jax.models.pretrained import PretrainedFolder

        model = PretrainedFolder.open(folder)
        jax.block_until_ready(jax.jit(lambda: jax.numpy.zeros(3))())

        def load():
            return jax.tree.leaves(jax.block_until_ready(model.load_params(dtype=dtype)))

    else:
        import torch
        from transformers import AutoModelForCausalLM, LlamaForCausalLM

        assert LlamaForCausalLM  # Its import is no part of loading.

        def load():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
            model.requires_grad_(False)
            return list(model.parameters())

    say(ready=True)
    sys.stdin.readline()
    start = time.perf_counter()
    found = load()
    seconds = time.perf_counter() - start
    sizes = [x.nbytes for x in found]
    say(seconds=seconds, result=sum(sizes), largest=max(sizes))
    sys.stdin.readline()  # What was loaded stays until its memory has been looked at.


def rss_anon(pid):
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel has no RssAnon")


def measure(library, dtype, folder):
    process = subprocess.Popen(
        [sys.executable, __file__, "--child", library, dtype, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        reports, arrived = [], threading.Event()

        def receive():
            for line in process.stdout:
                if line.startswith("{"):
                    reports.append(json.loads(line))
                    arrived.set()
            arrived.set()

        threading.Thread(target=receive, daemon=True).start()
        arrived.wait()
        if not reports:
            raise SystemExit(f"loading: the process for {library} failed")
        before = peak = rss_anon(process.pid)
        arrived.clear()
        process.stdin.write("go\n")
        process.stdin.flush()
        while not arrived.wait(0.001):
            peak = max(peak, rss_anon(process.pid))
        if len(reports) < 2:
            raise SystemExit(f"loading: the process for {library} failed")
        after = rss_anon(process.pid)
        process.stdin.close()
        process.wait()
    finally:
        process.kill()
    return reports[1] | {"before": before, "peak": peak - before, "after": after - before}


def line(row, stored):
    sizes = [row[k] for k in ("result", "beyond", "largest_stored", "largest")]
    cells = ["mapped" if x is None else f"{x / 1e6:.0f}" for x in sizes]
    if row["mapped"]:
        cells += ["–", f"{row['seconds']:.1f}", "–"]
    else:
        cells += [f"{row['beyond'] / row['largest']:.2f}", f"{row['seconds']:.1f}"]
        cells += [f"{stored / row['seconds'] / 1e9:.2f}"]
    return f"| {row['library']}, {row['dtype']} | {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    parser.add_argument("--folder", type=Path, help="where temporary files go")
    arguments = parser.parse_args()
    free = shutil.disk_usage(arguments.folder or tempfile.gettempdir()).free
    if free < 4 * 10**9:
        raise SystemExit(f"loading: needs 4 GB of disk for a while; there are {free / 1e9:.1f}")
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        stored, files = write_checkpoint(folder)
        largest_stored = max(2 * int(np.prod(shape)) for _, shape in tensors())
        print(f"{stored / 1e9:.2f} GB of bfloat16 in {files} files; sizes in MB\n")
        head = ("with", "result", "peak beyond", "largest stored", "largest parameter")
        print(f"| {' | '.join(head)} | beyond / largest | s | GB/s |")
        print("|---|" + "--:|" * 7)
        for library, dtype in RUNS:
            if library != "cipo_jax" and not importlib.util.find_spec("torch"):
                continue
            row = {"library": library, "dtype": dtype, "largest_stored": largest_stored}
            row |= measure(library, dtype, folder)
            # Parameters that are the mapped file itself have not been read yet.
            row["mapped"] = row["after"] < row["result"] / 2
            row["beyond"] = None if row["mapped"] else row["peak"] - row["result"]
            rows.append(row)
            print(line(row, stored), flush=True)
    if arguments.out:
        report = {"stored_bytes": stored, "files": files, "rows": rows}
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
