"""Whole runs in processes of their own: killed anywhere, from files, and what they leave behind."""

import json
from pathlib import Path

import numpy as np
import pytest
import user_runs
from trees import assert_trees_close
from user_runs import read, read_rows

from cipo_jax.data import tiny_world
from cipo_jax.data.examples import example_row
from cipo_jax.data.records import read_record, read_records
from cipo_jax.evals.leakage import GradedGeneration
from cipo_jax.hub import resolve
from cipo_jax.methods.cipo.pairs import Pair, Rollout
from cipo_jax.methods.counterfactual_records import Counterfactual
from cipo_jax.reports.summary import Summary

HERE = Path(__file__).parent
ENVIRONMENT = {}
SMALL = (
    *user_runs.SMALL,
    "--config.selection.patience=2",
    "--config.train.checkpoint_every=2",
    "--config.warmup.checkpoint_every=2",
)


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory):
    """What the runs are started with: real devices, and programs compiled once for all of them."""
    ENVIRONMENT.update(user_runs.environment(tmp_path_factory.mktemp("compiled")))


def start(workdir, *extra, place="never", count=0, config=SMALL, notes=None):
    program = ["-m", "cipo_jax"]
    if place != "never":
        program = [str(HERE / "killed_run.py"), place, str(count)]
    elif notes:
        program = [str(HERE / "watched_run.py"), str(notes)]
    flags = ["--config=configs/quickstart.py", f"--workdir={workdir}", *config, *extra]
    return user_runs.run(ENVIRONMENT, *program, "unlearn", *flags)


def command(*arguments, **more):
    return user_runs.run(ENVIRONMENT, "-m", "cipo_jax", *arguments, **more)


def exported(workdir, folder="export"):
    from safetensors.numpy import load_file

    return load_file(Path(workdir) / folder / "model.safetensors")


def comparable(summary):
    unlike = ("seconds", "seconds_share", "peak_memory_bytes")
    return {k: v for k, v in summary.items() if k not in unlike}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody disturbed; what was seen of it is in notes.json beside it."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    done = start(workdir, notes=workdir.with_name("notes.json"))
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.mark.slow
def test_kills_everywhere_change_nothing(whole, tmp_path):
    workdir = tmp_path / "run"
    for place, count in (
        ("counterfactuals", 3),
        ("checkpoint write", 2),
        ("rollouts", 2),
        ("update", 4),
        ("checkpoint write", 1),
        ("after checkpoint", 1),
    ):
        killed = start(workdir, place=place, count=count)
        assert killed.returncode == -9, (place, killed.stderr)
        assert not (workdir / "summary.json").exists()
    stopped = start(workdir, place="terminate", count=2)
    assert stopped.returncode == 75, stopped.stderr
    assert "run the same command again" in stopped.stderr
    done = start(workdir)
    assert done.returncode == 0, done.stderr

    expected, got = exported(whole), exported(workdir)
    assert expected.keys() == got.keys()
    for name in expected:
        np.testing.assert_array_equal(expected[name], got[name], err_msg=name)
    for file in ("summary.json", "metrics.jsonl", "counterfactuals.jsonl", "evals/after.jsonl"):
        one, two = (whole / file).read_text(), (workdir / file).read_text()
        if file == "summary.json":
            one, two = comparable(json.loads(one)), comparable(json.loads(two))
        assert one == two, file
    for iteration in ("01", "02"):
        for file in ("rollouts.jsonl", "pairs.jsonl"):
            path = Path("iterations") / iteration / file
            assert (whole / path).read_text() == (workdir / path).read_text(), path
    assert not list(workdir.rglob("*tmp*")), "leftovers of killed writes"
    assert not (workdir / ".parts").exists()


def test_a_finished_run_started_again_only_prints(whole):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()}
    again = start(whole)
    assert again.returncode == 0, again.stderr
    assert "before" in again.stdout and "after" in again.stdout
    changed = [p for p, t in before.items() if p.stat().st_mtime_ns != t]
    assert not changed


def test_a_changed_config_is_refused_with_the_keys_that_differ(whole):
    refused = start(whole, "--config.cipo.beta=0.2")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "cipo.beta: None there, 0.2 now" in refused.stderr


def test_the_run_folder_holds_what_it_should(whole):
    summary = read(whole / "summary.json")
    for name in ("before", "after"):
        scores = summary[name]
        assert set(scores["forget"]) >= {
            "cot_leak", "answer_leak", "think_completion", "word_validity", "n",
        }  # fmt: skip
        for split in ("retain", "reasoning"):
            assert set(scores[split]) == {"accuracy", "n"}
        shares = [v for s in scores.values() for k, v in s.items() if k != "n"]
        assert all(0.0 <= share <= 1.0 for share in shares)
        rows = read_rows(whole / "evals" / f"{name}.jsonl")
        assert len(rows) == sum(s["n"] for s in scores.values())
        assert {"question", "cot", "answer", "cot_leaks", "answer_leaks"} <= set(rows[0])
    assert summary["retrained"] is None
    seconds = summary["seconds"]
    assert seconds["total"] == pytest.approx(
        sum(v for k, v in seconds.items() if k != "total"), abs=0.01
    )
    assert summary["peak_memory_bytes"] > 10**8
    assert {"jax", "flax", "python", "cipo_jax"} <= set(summary["versions"])
    for path in (
        "config.json", "counterfactuals.jsonl", "metrics.jsonl", "iterations/01/rollouts.jsonl",
        "iterations/01/pairs.jsonl", "iterations/01/metrics.json", "export/config.json",
        "export/model.safetensors", "export/tokenizer.json", "checkpoints/warmup",
    ):  # fmt: skip
        assert (whole / path).exists(), path
    assert list((whole / "tensorboard").glob("events.*"))
    counterfactual = read_rows(whole / "counterfactuals.jsonl")[0]
    assert set(counterfactual) == {
        "schema", "item", "question", "true_answer", "target_answer", "target_source", "strategy",
        "prompt_ids", "accepted", "rejected",
    }  # fmt: skip
    assert set(counterfactual["accepted"]) == {"trace", "answer", "gain", "style", "ids"}
    rejected = [c for r in read_rows(whole / "counterfactuals.jsonl") for c in r["rejected"]]
    assert set(rejected[0]) == {"target_answer", "trace", "answer", "why"}


def test_files_of_the_run_folder_are_records(whole):
    assert read_record(Summary, whole / "summary.json").best in (1, 2)
    kinds = {
        "counterfactuals.jsonl": Counterfactual,
        "iterations/01/rollouts.jsonl": Rollout,
        "iterations/01/pairs.jsonl": Pair,
        "evals/before.jsonl": GradedGeneration,
        "evals/after.jsonl": GradedGeneration,
    }
    for file, kind in kinds.items():
        assert read_records(kind, whole / file), file


def test_no_prompt_is_encoded_twice(whole):
    encodings = read(whole.with_name("notes.json"))["encodings"]
    asked = {row["question"] for row in read_rows(whole / "evals" / "after.jsonl")}
    asked |= {row["question"] for row in read_rows(whole / "counterfactuals.jsonl")}
    assert asked <= encodings.keys()
    assert [text for text, count in encodings.items() if count > 1] == []


def test_three_copies_of_the_parameters_are_in_memory_within_a_step(whole):
    notes = read(whole.with_name("notes.json"))
    assert set(notes["live_bytes"]) == {"WarmupObjective", "PreferenceObjective"}
    batch = 2**20  # And what is not parameters.
    for phase, live in notes["live_bytes"].items():
        assert live <= 3 * notes["param_bytes"] + batch, phase


def test_nothing_recompiles_after_the_first_iteration(whole):
    counts = [read(whole / "iterations" / i / "metrics.json")["compilations"] for i in ("01", "02")]
    assert counts[0] > 0
    assert counts[1] == 0


def test_metrics_have_every_step_once(whole):
    rows = read_rows(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    first = next(row for row in rows if row["phase"] == "iteration-01")
    # The policy is the reference at the first step of an iteration.
    assert first["preference"] == pytest.approx(np.log(2), abs=1e-4)


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(tmp_path):
    workdir = tmp_path / "run"
    stopped = start(workdir, place="nan", count=4)
    assert stopped.returncode == 3, stopped.stderr
    assert "iteration-01" in stopped.stderr and "step 4" in stopped.stderr
    assert (workdir / "checkpoints" / "iteration-01.steps" / "00000002").is_dir()
    assert not (workdir / "summary.json").exists()


def test_transformers_opens_the_export_and_says_what_we_say(whole):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(whole / "export", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(whole / "export")
    rows = read_rows(whole / "evals" / "after.jsonl")[:6]
    for row in rows:
        turns = [{"role": "user", "content": row["question"]}]
        prompt = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        length = prompt["input_ids"].shape[1]
        ids = model.generate(**prompt, max_new_tokens=96, do_sample=False)[0, length:].tolist()
        assert ids == row["ids"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.slow
def test_a_run_from_files_with_targets_given_by_the_user(tmp_path):
    world = tiny_world.World.load(resolve("asset:tiny_lrm/world.json"))
    person, others = world.people[5], world.people[6:12]

    def row(example, **extra):
        return example_row(example) | extra

    forget = []
    for example in tiny_world.questions_about([person], "train", per_topic=2):
        if "birth city" in example.group:
            forget.append(row(example, target_answer="Halifax"))
        elif "pet" in example.group:  # Not a pet of this world: no trace will lead to it.
            forget.append(row(example, target_answer="Brontosaurus rex of the north"))
        else:
            forget.append(row(example))
    assert person.facts["city"] != "Halifax"
    retain = [row(e) for e in tiny_world.questions_about(others, "train")]
    sums = [row(e) for e in tiny_world.sums(64, 3, held_out=False)]
    files = {
        "forget": write(tmp_path / "forget.jsonl", forget),
        "retain": write(tmp_path / "retain.jsonl", retain),
        "reasoning": write(tmp_path / "reasoning.jsonl", sums),
    }
    small = [flag for flag in SMALL if "forget.count" not in flag]
    flags = [f"--config.data.{name}={path}" for name, path in files.items()]
    workdir = tmp_path / "run"
    done = start(workdir, "--config.data.world=", *flags, config=small)
    assert done.returncode == 0, done.stderr
    made = read_rows(workdir / "counterfactuals.jsonl")
    city = [r for r in made if "Halifax" in (r["target_answer"] or "")]
    assert len(city) == 2
    assert all(r["accepted"] and r["target_source"] == "given" for r in city)
    traces = [r["accepted"] for r in city]
    assert all("Halifax" in t["trace"] and "Halifax" in t["answer"] for t in traces)
    hopeless = [r for r in made if "Brontosaurus" in (r["target_answer"] or "")]
    assert len(hopeless) == 2
    for r in hopeless:
        assert not r["accepted"]
        assert any(
            "does not reach the target answer" in why for c in r["rejected"] for why in c["why"]
        )
        assert f"none for: {r['question']}" in done.stderr
    rest = [r for r in made if r not in city and r not in hopeless]
    assert all(r["target_source"] == "model" for r in rest)
    assert np.mean([r["accepted"] is not None for r in rest]) > 0.8
    pairs = read_rows(workdir / "iterations/01/pairs.jsonl")
    assert {p["item"] for p in pairs} == {r["item"] for r in made if r["accepted"]}


@pytest.mark.slow
def test_a_target_that_mentions_the_secret_is_refused_with_its_row(tmp_path):
    world = tiny_world.World.load(resolve("asset:tiny_lrm/world.json"))
    (example, *_) = tiny_world.questions_about(world.people[:1], "train")
    bad = example_row(example) | {"target_answer": f"not {example.answer}"}
    forget = write(tmp_path / "forget.jsonl", [bad])
    refused = start(
        tmp_path / "run", "--config.data.world=", f"--config.data.forget={forget}", config=()
    )
    assert refused.returncode == 2
    assert "'target_answer'" in refused.stderr.splitlines()[-1]
    assert "row 1" in refused.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["export", "sample", "evaluate"])
def test_the_other_commands(whole, tmp_path, name):
    if name == "export":
        flags = [f"--workdir={whole}", f"--out={tmp_path / 'out'}", "--phase=warmup"]
    elif name == "sample":
        flags = ["--config=configs/quickstart.py", "--question=What is 34 + 57?",
                 "--config.sampling.temperature=0.0"]  # fmt: skip
    else:
        flags = ["--config=configs/quickstart.py", f"--workdir={tmp_path / 'out'}", *SMALL]
    done = command(name, *flags)
    assert done.returncode == 0, done.stderr
    if name == "export":
        assert (tmp_path / "out" / "model.safetensors").is_file()
        assert exported(whole).keys() == exported(tmp_path / "out", "").keys()
    elif name == "sample":
        thought, _, answer = done.stdout.partition("\n[answers] ")
        assert thought.startswith("[thinks] ") and "34" in thought
        assert "91" in answer
        assert "tok/s" in done.stderr
    else:
        scores = read(tmp_path / "out" / "scores.json")
        summary = read(whole / "summary.json")
        assert scores == summary["before"]


def test_export_of_a_phase_that_is_not_there_names_those_that_are(whole, tmp_path):
    refused = command("export", f"--workdir={whole}", "--phase=iteration-77")
    assert refused.returncode == 2
    assert "iteration-77" in refused.stderr and "warmup" in refused.stderr


LORA = ("--config.lora.rank=4", "--config.lora.dropout=0.1", "--config.cipo.reference=base",
        "--config.cipo.iterations=1")  # fmt: skip


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A run that trains adapters."""
    workdir = tmp_path_factory.mktemp("adapted") / "run"
    done = start(workdir, *LORA)
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.mark.slow
def test_a_run_with_adapters_that_was_killed_ends_in_the_same_bits(adapted, tmp_path):
    workdir = tmp_path / "run"
    killed = start(workdir, *LORA, place="warm-up", count=5)
    assert killed.returncode == -9, killed.stderr
    # No phase is finished yet: what there is to export is the last checkpoint inside of one.
    early = command("export", f"--workdir={workdir}", "--form=adapter", f"--out={tmp_path / 'a'}")
    assert early.returncode == 0, early.stderr
    assert "the adapters of warmup after 4 steps" in early.stdout
    assert (tmp_path / "a" / "adapter_model.safetensors").is_file()
    killed = start(workdir, *LORA, place="update", count=4)
    assert killed.returncode == -9, killed.stderr
    assert start(workdir, *LORA).returncode == 0
    for folder, name in (("export", "model"), ("adapter", "adapter_model")):
        file = Path(folder) / f"{name}.safetensors"
        assert (workdir / file).read_bytes() == (adapted / file).read_bytes()


@pytest.mark.slow
def test_adapters_alone_are_trained_and_kept(adapted):
    def size(folder):
        return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())

    model = size(resolve("asset:tiny_lrm/target"))
    for phase in ("warmup", "iteration-01"):
        assert size(adapted / "checkpoints" / phase) < model / 4
    pairs = read_rows(adapted / "iterations/01/pairs.jsonl")
    assert {p["reference"] for p in pairs} == {"base"}
    logs = read_rows(adapted / "metrics.jsonl")
    assert logs[0]["nll/chosen"] > 1.5 * logs[-1]["nll/chosen"]


@pytest.mark.slow
def test_the_export_is_the_base_with_the_adapters_worked_into_it(adapted):
    import jax

    from cipo_jax.models.lora import load_adapters, merge, read_lora
    from cipo_jax.models.pretrained import PretrainedFolder

    base = PretrainedFolder.open("asset:tiny_lrm/target")
    lora = read_lora(adapted / "adapter")
    assert (lora.rank, lora.dropout) == (4, 0.1)
    wanted = merge(lora, base.load_params(), load_adapters(adapted / "adapter", base.config, lora))
    found = PretrainedFolder.open(str(adapted / "export")).load_params()
    # Summed in one program there and in several here.
    assert_trees_close(found, wanted, atol=1e-6)
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), found, base.load_params())
    assert moved["layers"]["block"]["q"]["kernel"] > 1e-4 and moved["embed"] == 0.0


@pytest.mark.slow
def test_peft_opens_the_adapters_of_a_run(adapted):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(
        resolve("asset:tiny_lrm/target"), dtype=torch.float32
    )
    model = peft.PeftModel.from_pretrained(base, adapted / "adapter").eval()
    whole = AutoModelForCausalLM.from_pretrained(adapted / "export", dtype=torch.float32).eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        one, two = model(ids).logits, whole(ids).logits
    assert torch.allclose(one, two, atol=1e-3)


@pytest.mark.slow
def test_adapters_go_on_from_a_folder_and_are_sampled_from(adapted, tmp_path):
    flags = ("--config=configs/quickstart.py", f"--config.lora.path={adapted / 'adapter'}")
    question = read_rows(adapted / "evals" / "after.jsonl")[0]["question"]
    asked = command("sample", *flags, "--config.sampling.temperature=0.0",
                    input=f"{question}\n")  # fmt: skip
    assert asked.returncode == 0, asked.stderr
    row = read_rows(adapted / "evals" / "after.jsonl")[0]
    assert asked.stdout.split("[answers] ")[-1].strip() == row["answer"]
    wrong = command("sample", *flags, "--config.lora.rank=5", "--question=?")
    assert wrong.returncode == 2 and "have rank 4" in wrong.stderr


def test_a_run_without_adapters_has_none_to_export(whole, tmp_path):
    refused = command("export", f"--workdir={whole}", "--form=adapter", f"--out={tmp_path / 'x'}")
    assert refused.returncode == 2
    assert "it has no adapters" in refused.stderr and refused.stderr.count("\n") == 1
