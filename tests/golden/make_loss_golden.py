"""Writes losses.json: what other people's code, or their formulas in torch, make of fixed inputs.

    python3.11 -m venv trl && trl/bin/pip install torch==2.13.0 trl==1.16.0
    trl/bin/python tests/golden/make_loss_golden.py

TRL is no dependency of the project and wants an environment of its own. Losses on pairs are TRL's
own code: `DPOTrainer._compute_loss`, `CPOTrainer.get_batch_loss_metrics` and the one of
`ORPOTrainer`, called on trainers that were never initialized, with fixed log-probabilities where
a model would be. The others are the formulas that open-unlearning uses, written again in torch;
only its definitions are taken, not its code. KD, which it has not, is torch's own divergence.

All is float64, except in ORPO, where TRL goes over to float32. Rows are not padded: some of
open-unlearning's means include padding, prompts, or both, which is not repeated here. RMU comes
one row at a time, since open-unlearning divides by [b, 1] what has the shape [b], and only b = 1
is then a mean over the row's tokens. CE-U counts every token; there a switch leaves out the first.

Of each case the file holds the arguments, by the names of inputs, the options, the loss, TRL's
metrics, and the gradients of the loss in what the policy said.
"""

import importlib.metadata
import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

GOLDEN = Path(__file__).parent / "losses.json"
SEED = 7
VOCABULARY, HIDDEN = 7, 4
PAIRS = {"chosen": (4, 9, 3, 7, 5, 6), "rejected": (6, 5, 8, 3, 9, 2)}  # Tokens of each.
ROWS = {"forget": (5, 2, 4), "retain": (3, 6)}
BETAS = (0.1, 0.5)
PAIR = ["chosen_logps", "rejected_logps"]
REFERENCE = ["ref_chosen_logps", "ref_rejected_logps"]
LENGTHS = ["chosen_lengths", "rejected_lengths"]


def make_inputs():
    """name -> numbers: [B] of pairs, or a list of unpadded rows [C], [C, V] or [C, D]."""
    rng = np.random.default_rng(SEED)

    def rounded(x):
        return np.round(x, 3).tolist()

    inputs = {}
    for side, lengths in PAIRS.items():
        n = np.array(lengths)
        ref = -rng.uniform(0.5, 3.0, len(n)) * n
        # Wide enough for margins beyond 10 nats, where the hinge loss at beta 0.1 is flat.
        policy = np.minimum(ref + rng.normal(0, 7, len(n)), -0.1 * n)
        inputs |= {f"{side}_lengths": list(lengths)}
        inputs |= {f"{side}_logps": rounded(policy), f"ref_{side}_logps": rounded(ref)}
    for part, lengths in ROWS.items():
        for name, shape in {"logps": (), "logits": (VOCABULARY,), "hidden": (HIDDEN,)}.items():
            for whose in ("", "ref_"):
                rows = [rng.normal(0, 2, (n, *shape)) for n in lengths]
                if name == "logps":
                    rows = [-np.abs(row) - 0.05 for row in rows]
                inputs[f"{part}_{whose}{name}"] = [rounded(row) for row in rows]
        inputs[f"{part}_targets"] = [rng.integers(0, VOCABULARY, n).tolist() for n in lengths]
        inputs[f"{part}_lengths"] = list(lengths)
    direction = rng.uniform(size=HIDDEN)
    inputs["direction"] = rounded(direction / np.linalg.norm(direction))
    # What NPO and SimNPO take: sums over the rows.
    for whose in ("", "ref_"):
        rows = inputs[f"forget_{whose}logps"]
        inputs[f"forget_{whose}sums"] = rounded(np.array([sum(row) for row in rows]))
    # The longest row alone, for RMU.
    for part, name in (("forget", "hidden"), ("retain", "hidden"), ("retain", "ref_hidden")):
        inputs[f"single_{part}_{name}"] = [max(inputs[f"{part}_{name}"], key=len)]
    return inputs


# ---- TRL

ALONE = SimpleNamespace(
    device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
)


def bare(trainer, **attributes):
    """A trainer that was never initialized."""
    made = object.__new__(trainer)
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def trl_dpo(loss_type, chosen, rejected, ref_chosen, ref_rejected, n_w, n_l, *, beta, smoothing=0):
    """Loss and metrics of a batch. A prompt is one token; log-probs are spread over the others."""
    from trl import DPOTrainer

    lengths = torch.cat([n_w, n_l])
    # Position 0 is the prompt.
    mask = (torch.arange(int(lengths.max()) + 1) <= lengths[:, None]).long()
    mask[:, 0] = 0
    tokens = mask[:, 1:] * (torch.cat([chosen, rejected]) / lengths)[:, None]
    nothing = torch.zeros_like(tokens)
    outputs = SimpleNamespace(
        log_probs=tokens, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
    )
    trainer = bare(
        DPOTrainer,
        model=SimpleNamespace(training=True),
        accelerator=ALONE,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        use_weighting=False,
        beta=beta,
        label_smoothing=smoothing,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    batch = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    loss = trainer._compute_loss(lambda **_: outputs, batch, return_outputs=False)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def trl_smoothed_dpo(*args, beta, smoothing):
    """Label smoothing, which "sigmoid" has no more: "aot" one pair at a time, sorting nothing."""
    parts = [
        trl_dpo("aot", *(x[i : i + 1] for x in args), beta=beta, smoothing=smoothing)
        for i in range(len(args[0]))
    ]
    metrics = {name: float(np.mean([m[name] for _, m in parts])) for name in parts[0][1]}
    return torch.stack([loss for loss, _ in parts]).mean(), metrics


def trl_without_reference(trainer, chosen, rejected, nll, **attributes):
    """Loss and metrics, given log-probs as the trainer averages them and the NLL term."""
    nothing = torch.zeros(1, dtype=torch.float64)
    made = bare(
        trainer,
        accelerator=ALONE,
        aux_loss_enabled=False,
        concatenated_forward=lambda model, batch: (chosen, rejected, nothing, nothing, nll),
        **attributes,
    )
    return made.get_batch_loss_metrics(None, None)


def trl_cpo(chosen, rejected, n_w, *, beta, alpha, smoothing=0.0):
    """The NLL is that of each completion, averaged: TRL averages over the batch's tokens."""
    from trl.experimental.cpo import CPOTrainer

    return trl_without_reference(
        CPOTrainer, chosen, rejected, -(chosen / n_w).mean(), loss_type="sigmoid", beta=beta,
        alpha=0.0, cpo_alpha=alpha, label_smoothing=smoothing,
    )  # fmt: skip


def trl_simpo(chosen, rejected, n_w, n_l, *, beta, gamma, smoothing=0.0):
    """On means over tokens, and without the NLL term that TRL adds unless cpo_alpha is 0."""
    from trl.experimental.cpo import CPOTrainer

    return trl_without_reference(
        CPOTrainer, chosen / n_w, rejected / n_l, torch.tensor(0.0), loss_type="simpo", beta=beta,
        alpha=0.0, cpo_alpha=0.0, simpo_gamma=gamma, label_smoothing=smoothing,
    )  # fmt: skip


def trl_orpo(chosen, rejected, n_w, n_l, *, beta):
    """On means over tokens. The NLL is that of each completion: TRL adds the prompt's tokens."""
    from trl.experimental.orpo import ORPOTrainer

    return trl_without_reference(
        ORPOTrainer, chosen / n_w, rejected / n_l, -(chosen / n_w).mean(), beta=beta
    )


KEPT = ("rewards/", "logps/")  # Metrics that we have as well.


def trl_cases(inputs):
    def case(loss, source, arguments, function, options, fed=None):
        arrays = tensors(inputs, fed or arguments)
        for name in PAIR:
            arrays[name].requires_grad_()
        value, metrics = function(*arrays.values())
        value.backward()
        return {
            "loss": loss,
            "source": source,
            "arguments": arguments,
            "options": options,
            "value": value.item(),
            "metrics": {k: float(v) for k, v in metrics.items() if k.startswith(KEPT)},
            "gradients": {name: arrays[name].grad.tolist() for name in PAIR},
        }

    compared, whole = PAIR + REFERENCE, PAIR + REFERENCE + LENGTHS
    dpo = "trl DPOTrainer"
    for b in BETAS:
        beta, noisy = {"beta": b}, {"beta": b, "label_smoothing": 0.1}
        yield case(
            "dpo",
            f"{dpo} sigmoid",
            compared,
            lambda *x, b=b: trl_dpo("sigmoid", *x, beta=b),
            beta,
            whole,
        )
        yield case(
            "dpo",
            f"{dpo} aot",
            compared,
            lambda *x, b=b: trl_smoothed_dpo(*x, beta=b, smoothing=0.1),
            noisy,
            whole,
        )
        yield case(
            "hinge",
            f"{dpo} hinge",
            compared,
            lambda *x, b=b: trl_dpo("hinge", *x, beta=b),
            beta,
            whole,
        )
        yield case("ipo", f"{dpo} ipo", whole, lambda *x, b=b: trl_dpo("ipo", *x, beta=b), beta)
        yield case(
            "robust_dpo",
            f"{dpo} robust",
            compared,
            lambda *x, b=b: trl_dpo("robust", *x, beta=b, smoothing=0.1),
            noisy,
            whole,
        )
        yield case(
            "cpo",
            "trl CPOTrainer sigmoid",
            PAIR + LENGTHS[:1],
            lambda *x, b=b: trl_cpo(*x, beta=b, alpha=1.0),
            beta,
        )
        yield case(
            "cpo",
            "trl CPOTrainer sigmoid",
            PAIR + LENGTHS[:1],
            lambda *x, b=b: trl_cpo(*x, beta=b, alpha=0.5, smoothing=0.1),
            noisy | {"alpha": 0.5},
        )
        yield case(
            "orpo", "trl ORPOTrainer", PAIR + LENGTHS, lambda *x, b=b: trl_orpo(*x, beta=b), beta
        )
    for b in (*BETAS, 2.0):
        for e in (0.0, 0.1):
            yield case("simpo", "trl CPOTrainer simpo", PAIR + LENGTHS,
                       lambda *x, b=b, e=e: trl_simpo(*x, beta=b, gamma=0.5, smoothing=e),
                       {"beta": b, "gamma": 0.5, "label_smoothing": e})  # fmt: skip


# ---- the formulas of open-unlearning

# Token arguments are lists of rows, everything else is [B]. NLLs are positive.


def token_mean(rows):
    return torch.cat(rows).mean()


def nll_of(logps):
    return token_mean([-row for row in logps])


def log_ratio(logps, ref):
    return logps - ref.detach()


def weighted(logps, weight):
    """GA with weights that are held fixed: of each token's probability."""
    return -token_mean([weight(row.detach().exp()) * -row for row in logps])


def sum_of_rows(function, *rows):
    return token_mean([function(*of_row) for of_row in zip(*rows, strict=True)])


def kl_formula(z, ref):
    return F.kl_div(z.log_softmax(-1), ref.log_softmax(-1), reduction="none", log_target=True).sum(
        -1
    )


def kd_formula(z, teacher, T):
    return T * T * kl_formula(z / T, teacher / T)


def ceu_formula(z, y):
    target = z.detach().clone()
    target[torch.arange(len(y)), y] = -torch.inf
    return F.cross_entropy(z, target.softmax(-1), reduction="none")


def undial_formula(z, ref, y, b):
    lowered = ref - b * F.one_hot(y, ref.shape[-1])
    return F.cross_entropy(z, lowered.softmax(-1), reduction="none")


def flatness_formula(z):
    return (z.amax(-1) - z.mean(-1)) ** 2


def formula_cases(inputs):
    """What is called "x_mask" is no input here: it tells which arguments of ours a case has."""

    def case(loss, arguments, policy, function, **options):
        arrays = tensors(inputs, [name for name in arguments if not name.endswith("_mask")])
        for name in policy:
            for row in rows_of(arrays[name]):
                row.requires_grad_()
        value = function(*arrays.values())
        value.backward()
        gradients = {name: [row.grad.tolist() for row in rows_of(arrays[name])] for name in policy}
        return {
            "loss": loss,
            "source": "formula in torch",
            "arguments": arguments,
            "options": options,
            "value": value.item(),
            "metrics": {},
            # Of [B] arrays the gradient is one row.
            "gradients": {
                k: v if isinstance(arrays[k], list) else v[0] for k, v in gradients.items()
            },
        }

    logps = ["forget_logps", "forget_mask"]
    logits = ["forget_logits", "forget_ref_logits"]
    yield case("ga", logps, logps[:1], lambda x: -nll_of(x))
    for gamma, alpha in ((1.0, 1.0), (0.3, 2.0)):
        yield case(
            "grad_diff", [*logps, "retain_logps", "retain_mask"], ["forget_logps", "retain_logps"],
            lambda f, r, g=gamma, a=alpha: -g * nll_of(f) + a * nll_of(r), gamma=gamma, alpha=alpha,
        )  # fmt: skip
    for b in BETAS:
        yield case(
            "npo", ["forget_sums", "forget_ref_sums"], ["forget_sums"],
            lambda x, ref, b=b: -2 / b * F.logsigmoid(b * -log_ratio(x, ref)).mean(), beta=b,
        )  # fmt: skip
        yield case(
            "idk_dpo", PAIR + REFERENCE, PAIR,
            lambda w, l, rw, rl, b=b:  # noqa: E741
                -2 / b * F.logsigmoid(b * (log_ratio(w, rw) - log_ratio(l, rl))).mean(),
            beta=b,
        )  # fmt: skip
    for b, d in ((4.5, 0.0), (1.0, 0.4)):
        yield case(
            "simnpo", ["forget_sums", "forget_lengths"], ["forget_sums"],
            lambda x, n, b=b, d=d: -2 / b * F.logsigmoid(b * (-x / n - d)).mean(), beta=b, delta=d,
        )  # fmt: skip
    for b in (1.0, 0.5):
        yield case(
            "wga", logps, logps[:1], lambda x, b=b: weighted(x, lambda p: p**b), beta=b
        )  # fmt: skip
    for b1, b2 in ((5.0, 1.0), (1.0, 2.0)):
        yield case(
            "satimp", logps, logps[:1],
            lambda x, b1=b1, b2=b2: weighted(x, lambda p: p**b1 * (1 - p) ** b2),
            beta1=b1, beta2=b2,
        )  # fmt: skip
    yield case("kl", [*logits, "forget_mask"], logits[:1],
               lambda z, ref: sum_of_rows(kl_formula, z, ref))  # fmt: skip
    yield case(
        "kd", [*logits, "forget_mask"], logits[:1],
        lambda z, ref: sum_of_rows(lambda a, b: kd_formula(a, b, 2.0), z, ref), temperature=2.0,
    )  # fmt: skip
    yield case("ceu", [logits[0], "forget_targets", "forget_mask"], logits[:1],
               lambda z, y: sum_of_rows(ceu_formula, z, y))  # fmt: skip
    for b in (10.0, 3.0):
        yield case(
            "undial", [*logits, "forget_targets", "forget_mask"], logits[:1],
            lambda z, ref, y, b=b: sum_of_rows(lambda *x: undial_formula(*x, b), z, ref, y), beta=b,
        )  # fmt: skip
    yield case("flatness", [logits[0], "forget_mask"], logits[:1],
               lambda z: sum_of_rows(flatness_formula, z))  # fmt: skip
    hidden, kept = "single_forget_hidden", ["single_retain_hidden", "single_retain_ref_hidden"]
    for c in (6.5, 2.0):
        yield case(
            "rmu_forget", [hidden, "single_forget_mask", "direction"], [hidden],
            lambda h, u, c=c: F.mse_loss(h[0], (c * u).expand_as(h[0])), scale=c,
        )  # fmt: skip
    yield case("hidden_match", [*kept, "single_retain_mask"], kept[:1],
               lambda h, h0: F.mse_loss(h[0], h0[0]))  # fmt: skip


# ----


def rows_of(array):
    return array if isinstance(array, list) else [array]


def tensors(inputs, names):
    """name -> tensor, or list of tensors where inputs has rows. Fresh ones, so gradients are."""

    def tensor(x):
        made = torch.tensor(x)
        return made.double() if made.is_floating_point() else made

    return {
        name: [tensor(row) for row in inputs[name]]
        if isinstance(inputs[name][0], list)
        else tensor(inputs[name])
        for name in names
    }


def main():
    torch.set_default_dtype(torch.float64)
    inputs = make_inputs()
    cases = [*trl_cases(inputs), *formula_cases(inputs)]
    for case in cases:
        if case["loss"] == "hinge":
            slopes = np.array(case["gradients"]["chosen_logps"])
            if (slopes == 0).all() or (slopes != 0).all():
                raise SystemExit("every pair is on the same side of the hinge; choose another seed")
    versions = {name: importlib.metadata.version(name) for name in ("trl", "torch", "transformers")}

    def lines(entries):
        return ",\n".join(f"  {entry}" for entry in entries)

    GOLDEN.write_text(
        f'{{"versions": {json.dumps(versions)},\n"inputs": {{\n'
        + lines(f"{json.dumps(name)}: {json.dumps(x)}" for name, x in inputs.items())
        + '\n},\n"cases": [\n'
        + lines(map(json.dumps, cases))
        + "\n]}\n",
        encoding="utf-8",
    )
    print(f"{GOLDEN}: {len(cases)} cases, {GOLDEN.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
