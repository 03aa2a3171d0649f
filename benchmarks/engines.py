"""Engines side by side: a process for each, one of which works at a time, and their tables.

sampling.py and training.py measure with it; peer.py is the other end of the pipe.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "cipo_jax" / "assets" / "tiny_lrm" / "target"
PAUSE = 0.3  # seconds for another process's threads to go to sleep


class Failed(Exception):
    pass


class Engine:
    """A process of `python script name ...` that answers questions."""

    def __init__(self, name, python, script, words, threads, environment=None):
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        kept = {
            key: value
            for key, value in os.environ.items()
            if key not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
        }
        self._process = subprocess.Popen(
            [python, str(script), name, *map(str, words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=kept
            | {
                "JAX_PLATFORMS": "cpu",
                "JAX_ENABLE_COMPILATION_CACHE": "false",
                "OMP_NUM_THREADS": str(threads),
                "TOKENIZERS_PARALLELISM": "false",
                "HF_HUB_OFFLINE": "1",
                "TQDM_DISABLE": "1",
            }
            | (environment or {}),
        )

    def send(self, value):
        # Where the process has ended, `receive` raises.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(value) + "\n")
            self._process.stdin.flush()

    def receive(self):
        line = self._process.stdout.readline()
        report = json.loads(line) if line else {"error": f"ended with {self._process.wait()}"}
        if "error" in report:
            self._errors.seek(0)
            sys.stderr.write(self._errors.read()[-4000:])
            raise Failed(report["error"])
        return report

    def ask(self, question):
        self.send(question)
        report = self.receive()
        time.sleep(PAUSE)
        return report

    def close(self):
        self._process.kill()
        self._process.wait()
        self._errors.close()


def progress(text):
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def standing(names, make, failures):
    """Engines and their descriptions, by name; `make(name)` starts a process.

    One starts after another, since each measures its library's limit. At the end the limit is
    measured again, and the better one counts.
    """
    engines, about = {}, {}
    try:
        for name in names:
            engine = make(name)
            try:
                about[name] = engine.receive()
                engines[name] = engine
                progress(f"{name}: {about[name]}")
            except Failed as error:
                failures.append(f"{name} could not start: {error}")
                engine.close()
            time.sleep(PAUSE)
        yield engines, about
        for name, engine in engines.items():
            with contextlib.suppress(Failed):
                about[name]["matmul"] = max(about[name]["matmul"], engine.ask("matmul")["matmul"])
    finally:
        for engine in engines.values():
            engine.close()


# ---- models


def _count_weights(folder):
    """Numbers in the files, and those of the embedding."""
    total = embedding = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as f:
            header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                size = math.prod(tensor["shape"])
                total += size
                embedding += size if "embed_tokens" in name else 0
    if not total:
        raise SystemExit(f"{folder}: has no safetensors")
    return total, embedding


class Model:
    """The sizes that limits depend on."""

    def __init__(self, folder):
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.vocabulary, self.d_model = fields["vocab_size"], fields["hidden_size"]
        self.layers, self.heads = fields["num_hidden_layers"], fields["num_attention_heads"]
        self.kv_heads = fields.get("num_key_value_heads") or self.heads
        self.head_dim = fields.get("head_dim") or self.d_model // self.heads
        self.all_weights, embedding = _count_weights(folder)
        tied = fields.get("tie_word_embeddings", False)
        self.weights = self.all_weights - (0 if tied else embedding)


# ---- arguments


def add_arguments(parser, engines, document):
    """The arguments that all measurements share."""
    parser.add_argument("--model", type=Path, default=TINY, help="a Hugging Face folder")
    parser.add_argument("--engines", default=engines)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    parser.add_argument("--write", action="store_true", help=f"put the table into {document}")


def check_arguments(parser, arguments, engines, document):
    """Names of the engines; ends the program where arguments are wrong. Takes the processors."""
    names = arguments.engines.split(",")
    if unknown := set(names) - set(engines):
        parser.error(f"no such engines: {', '.join(sorted(unknown))}")
    if arguments.repeats < 1:
        parser.error("--repeats: at least 1")
    if arguments.write:
        document.check(parser)
    if not (arguments.model / "config.json").is_file():
        parser.error(f"--model {arguments.model}: has no config.json")
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < arguments.threads:
        parser.error(f"--threads {arguments.threads}: there are {len(cpus)} processors")
    os.sched_setaffinity(0, cpus[: arguments.threads])  # The engines inherit it.
    return names


# ---- tables and notes


class Document:
    """A page of docs/ with a place for a table."""

    def __init__(self, name, mark):
        self._path = ROOT / "docs" / name
        self._begin, self._end = f"<!-- {mark}:begin -->\n", f"<!-- {mark}:end -->\n"

    def __str__(self):
        return f"docs/{self._path.name}"

    def check(self, parser):
        text = self._path.read_text(encoding="utf-8") if self._path.is_file() else ""
        if text.count(self._begin) != 1 or text.count(self._end) != 1:
            parser.error(f"{self} needs one {self._begin.strip()} and one {self._end.strip()}")

    def put(self, table):
        before, rest = self._path.read_text(encoding="utf-8").split(self._begin)
        after = rest.split(self._end)[1]
        self._path.write_text(before + self._begin + table + self._end + after, encoding="utf-8")


def table(head, rows, texts=1):
    """Lines of a Markdown table; all columns but the first `texts` are numbers."""
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * texts + "--:|" * (len(head) - texts)
    for cells in rows:
        yield f"| {' | '.join(cells)} |"


def ratio_cell(row):
    return "–" if row["ratio"] is None else f"{row['ratio']:.2f}"


def compile_cell(row):
    if row["compiles"] is None:
        return "–"
    return f"{row['compile_seconds']:.1f} ({row['compiles']})"


def surroundings(runs):
    """Notes on what else went on while these were timed."""
    others = sum(t["others"] for t in runs) / max(sum(t["seconds"] for t in runs), 1e-9)
    yield f"While it was timed, other processes kept {others:.2f} processors busy."
    if not all(t["reset"] for t in runs):
        yield "The kernel does not let peaks start anew: they are those since the process began."


def publish(arguments, document, lines, notes, numbers):
    """Prints the table and the notes, and writes what was asked for."""
    text = "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"
    print(text, end="")
    if arguments.out:
        report = numbers | {"notes": notes}
        arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if arguments.write:
        document.put(text)
