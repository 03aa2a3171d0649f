"""What an update step costs, beside torch and TRL: one run, same weights, pairs and optimizer.

    python benchmarks/training.py [--model DIR] [--torch-python PYTHON] [--write]

Linux, CPU, float32, two threads. Engines are described in training_peers.py. Those of torch run in
the python that is given, which needs torch and transformers; where it has TRL too, TRL's own loss
is measured, else the same formula written in torch stands alone, and the last lines say so:
`python3.11 -m venv DIR && DIR/bin/pip install torch transformers trl`. Every engine has one
process, which stays; only one of them works at a time. All make one step to warm up, which also
tells what is compiled, then the timed ones in turn (A B C A B C ...); what is shown is the median.

A step is forward pass, DPO loss, backward pass, clipping and AdamW, on 4 pairs of 256 tokens: a
prompt of 64 random ids (fixed seed) and completions of 192. Losses of all engines are compared step
by step: that of the first is ln 2, the later ones tell whether gradients and optimizers agree.

The machine should have nothing else to do: threads that wait for each other lose far more than the
share that others take. The last lines tell how busy others were.

Columns:

- s a step: median, and in brackets the fastest and the slowest.
- ratio: seconds of the engine over ours in the same round, the median over the rounds. Above 1 it
  is slower than we are.
- peak: greatest resident memory of the process in a timed step, libraries and weights included.
- beyond: the same, less what was resident before the step: weights, optimizer state and libraries.
  Freed memory is given back to the kernel before each step.
- faults: pages that the kernel had to hand out in a step, in thousands.
- % matmul: useful operations over what the engine's own library does per second at
  2048 x 2048 x 2048 in float32, best of 5 before and 5 after all runs in any process with that
  library. Useful are, forward and twice that backward, the products with the weights of the layers
  for all real tokens, with the head for the tokens of the completions alone, and causal attention:

      6 W T + 6 D V C + 12 L N H * sum over rows of t (t + 1) / 2

  with W weights of the layers, T real tokens, C those of completions, D and V sizes of the head,
  L layers, N heads of size H, t tokens of a row. What is computed again, the reference model, the
  head over prompts, and masked scores do not count.
- compile: what XLA's compiler took in the step to warm up, and how many programs.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from sampling import PAUSE, TINY, Failed, Model, progress

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "training.md"
BEGIN, END = "<!-- training:begin -->\n", "<!-- training:end -->\n"
PEERS = Path(__file__).with_name("training_peers.py")
ENGINES = ("ours", "ours-none", "ours-full", "torch", "torch-ref", "trl", "trl-default")
AGREE = 1e-4  # between losses of one step


def make_job(vocabulary, arguments):
    rng = np.random.default_rng(0)

    def ids(count):
        return rng.integers(1, vocabulary, count).tolist()

    rest = arguments.tokens - arguments.prompt
    return {
        "pairs": [
            {"prompt": ids(arguments.prompt), "chosen": ids(rest), "rejected": ids(rest)}
            for _ in range(arguments.pairs)
        ],
        "beta": 0.1,
        "lr": 1e-6,  # TRL's default
        "b1": 0.9,
        "b2": 0.999,
        "clip": 1.0,
    }


def operations(model, job):
    """Useful ones of a step."""
    head = model.vocabulary * model.d_model
    rows = [
        (len(pair["prompt"]), len(pair[side]))
        for pair in job["pairs"]
        for side in ("chosen", "rejected")
    ]
    tokens = sum(p + n for p, n in rows)
    total = 6 * (model.weights - head) * tokens + 6 * head * sum(n for _, n in rows)
    seen = sum((p + n) * (p + n + 1) // 2 for p, n in rows)
    return total + 12 * model.layers * model.heads * model.head_dim * seen


class Engine:
    """A process that makes steps."""

    def __init__(self, name, arguments, job):
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        environment = {
            key: value
            for key, value in os.environ.items()
            if key not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
        }
        environment |= {
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            "OMP_NUM_THREADS": str(arguments.threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "TQDM_DISABLE": "1",
        }
        if arguments.xla_flags:
            environment["XLA_FLAGS"] = arguments.xla_flags
        python = sys.executable if name.startswith("ours") else arguments.torch_python
        self._process = subprocess.Popen(
            [python, str(PEERS), name, str(arguments.model), str(arguments.threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )
        self._send(job)

    def _send(self, value):
        # Where it has ended there is nothing to hear, and `listen` says so.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(value) + "\n")
            self._process.stdin.flush()

    def listen(self):
        line = self._process.stdout.readline()
        told = json.loads(line) if line else {"error": f"ended with {self._process.wait()}"}
        if "error" in told:
            self._errors.seek(0)
            sys.stderr.write(self._errors.read()[-4000:])
            raise Failed(told["error"])
        return told

    def ask(self, what):
        self._send(what)
        return self.listen()

    def close(self):
        self._process.kill()
        self._process.wait()
        self._errors.close()


def begin(names, arguments, job, failures):
    """Starts one after another, since each measures its library's limit."""
    engines, about = {}, {}
    for name in names:
        engine = Engine(name, arguments, job)
        try:
            about[name] = engine.listen()
            engines[name] = engine
            progress(f"{name}: {about[name]}")
        except Failed as error:
            failures.append(f"{name} could not start: {error}")
            engine.close()
        time.sleep(PAUSE)
    return engines, about


def measure(engines, repeats, failures):
    """Engine -> answers, the first of them from the step to warm up."""
    found = {name: [] for name in engines}
    for number in range(1 + repeats):
        for name, engine in engines.items():
            if name not in found:
                continue
            try:
                told = engine.ask("step")
            except Failed as error:
                failures.append(f"{name} failed at step {number}: {error}")
                del found[name]
                continue
            time.sleep(PAUSE)
            found[name].append(told)
            progress(
                f"{name} {number}: {told['seconds']:.2f} s, loss {told['loss']:.6f}, "
                f"peak {told['peak']:.0f} MiB"
            )
    return found


def rows_of(found, about, useful):
    for name, (warm, *timed) in found.items():
        seconds = statistics.median(t["seconds"] for t in timed)
        ratio = None
        if "ours" in found:
            pairs = zip(timed, found["ours"][1:], strict=True)
            ratio = statistics.median(t["seconds"] / our["seconds"] for t, our in pairs)
        yield {
            "engine": name,
            "seconds": seconds,
            "fastest": min(t["seconds"] for t in timed),
            "slowest": max(t["seconds"] for t in timed),
            "ratio": ratio,
            "peak": max(t["peak"] for t in timed),
            "beyond": max(t["peak"] - t["resident"] for t in timed),
            "faults": statistics.median(t["faults"] for t in timed),
            "matmul": useful / about[name]["matmul"] / seconds,
            "compile_seconds": warm.get("compile_seconds"),
            "compiles": warm.get("compiles"),
            "losses": [t["loss"] for t in (warm, *timed)],
        }


def lines_of(rows):
    head = ("engine", "s a step", "ratio", "peak MiB", "beyond", "faults k", "% matmul")
    yield f"| {' | '.join(head)} | compile s (programs) |"
    yield "|---|" + "--:|" * 7
    for row in rows:
        compiled = "–"
        if row["compiles"] is not None:
            compiled = f"{row['compile_seconds']:.1f} ({row['compiles']})"
        cells = [
            row["engine"],
            f"{row['seconds']:.2f} ({row['fastest']:.2f} to {row['slowest']:.2f})",
            "–" if row["ratio"] is None else f"{row['ratio']:.2f}",
            f"{row['peak']:.0f}",
            f"{row['beyond']:.0f}",
            f"{row['faults'] / 1000:.0f}",
            f"{100 * row['matmul']:.1f}",
            compiled,
        ]
        yield f"| {' | '.join(cells)} |"


def notes_of(rows, found, about, model, job, useful, arguments, failures):
    yield (
        f"{model.all_weights / 1e6:.1f} million parameters in float32, {arguments.pairs} pairs of "
        f"{arguments.tokens} tokens, prompts of {arguments.prompt}; {arguments.threads} threads, "
        f"medians of {arguments.repeats}; {useful / 1e12:.2f} Tflop are useful in a step."
    )
    for name, told in about.items():
        yield f"{name}: {told['version']}; matmul {told['matmul'] / 1e9:.0f} Gflop/s."
    if not any(name.startswith("trl") for name in found):
        yield "TRL was not there: torch computes the same formula, written in torch."
    if rows:
        steps = list(zip(*(row["losses"] for row in rows), strict=True))
        apart = max(max(losses) - min(losses) for losses in steps)
        text = "agree" if apart <= AGREE else "DO NOT AGREE"
        first = ", ".join(f"{loss:.5f}" for loss in rows[0]["losses"])
        yield (
            f"Losses {text}: those of one step differ by at most {apart:.1e} over {len(rows)} "
            f"engines; {rows[0]['engine']}: {first}."
        )
    for name, (_, *timed) in found.items():
        if again := sum(t.get("compiles", 0) for t in timed):
            yield f"{name} compiled {again} programs more in the timed steps."
    steps = [t for _, *timed in found.values() for t in timed]
    others = sum(t["others"] for t in steps) / max(sum(t["seconds"] for t in steps), 1e-9)
    yield f"While steps were timed, other processes kept {others:.2f} processors busy."
    if not all(t["reset"] for t in steps):
        yield "The kernel does not let peaks start anew: they are those since the process began."
    for failure in failures:
        yield f"{failure}."


def has_trl(python):
    question = "import importlib.util as u, sys; sys.exit(u.find_spec('trl') is None)"
    return not subprocess.run([python, "-c", question], check=False).returncode


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=TINY, help="a Hugging Face folder")
    parser.add_argument("--engines", default="ours,ours-full,torch,torch-ref,trl,trl-default")
    parser.add_argument("--torch-python", default=sys.executable, help="python that has torch")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="of prompt and completion")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--xla-flags", default="", help="XLA_FLAGS of our processes")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    parser.add_argument("--write", action="store_true", help="put the table into docs/training.md")
    arguments = parser.parse_args()
    names = arguments.engines.split(",")
    if unknown := set(names) - set(ENGINES):
        parser.error(f"no such engines: {', '.join(sorted(unknown))}")
    if arguments.repeats < 1:
        parser.error("--repeats: at least 1")
    if not 0 < arguments.prompt < arguments.tokens:
        parser.error("--prompt: at least 1, and less than --tokens")
    if arguments.write:
        text = DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.is_file() else ""
        if text.count(BEGIN) != 1 or text.count(END) != 1:
            parser.error(f"docs/{DOCUMENT.name} needs one {BEGIN.strip()} and one {END.strip()}")
    if not (arguments.model / "config.json").is_file():
        parser.error(f"--model {arguments.model}: has no config.json")
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < arguments.threads:
        parser.error(f"--threads {arguments.threads}: there are {len(cpus)} processors")
    os.sched_setaffinity(0, cpus[: arguments.threads])  # The engines inherit it.
    if not has_trl(arguments.torch_python):
        names = [name for name in names if not name.startswith("trl")]
    return arguments, names


def main():
    arguments, names = parse()
    model = Model(arguments.model)
    job = make_job(model.vocabulary, arguments)
    useful = operations(model, job)
    failures, engines = [], {}
    try:
        engines, about = begin(names, arguments, job, failures)
        found = measure(engines, arguments.repeats, failures)
        for name, engine in engines.items():
            with contextlib.suppress(Failed):
                about[name]["matmul"] = max(about[name]["matmul"], engine.ask("matmul")["matmul"])
            time.sleep(PAUSE)
    finally:
        for engine in engines.values():
            engine.close()
    for told in about.values():  # Engines of one library have one limit.
        same = [a["matmul"] for a in about.values() if a["library"] == told["library"]]
        told["matmul"] = max(same)
    rows = list(rows_of(found, about, useful))
    notes = list(notes_of(rows, found, about, model, job, useful, arguments, failures))
    text = "\n".join([*lines_of(rows), "", *(f"- {note}" for note in notes)]) + "\n"
    print(text, end="")
    if arguments.out:
        told = {"rows": rows, "notes": notes, "engines": about, "steps": found, "useful": useful}
        arguments.out.write_text(json.dumps(told, indent=2) + "\n")
    if arguments.write:
        document = DOCUMENT.read_text(encoding="utf-8")
        before, rest = document.split(BEGIN)
        after = rest.split(END)[1]
        DOCUMENT.write_text(before + BEGIN + text + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
