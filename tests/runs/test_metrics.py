"""metrics.jsonl holds every step once."""

import json

from cipo_jax.files import read_jsonl
from cipo_jax.runs.metrics import MetricsLog


def _steps(folder):
    return [row["step"] for row in read_jsonl(folder / "metrics.jsonl")]


def test_the_log_holds_every_step_once(tmp_path):
    log = MetricsLog(tmp_path)
    log.rewind(0)
    for step in range(1, 6):
        log.write(step, "warmup", {"loss": 1.0 / step})
    log.close()
    again = MetricsLog(tmp_path)
    again.rewind(3)
    assert _steps(tmp_path) == [1, 2, 3]
    again.write(4, "iteration-01", {"loss": 9.0})
    again.close()
    assert read_jsonl(tmp_path / "metrics.jsonl")[-1] == {
        "step": 4, "phase": "iteration-01", "loss": 9.0,
    }  # fmt: skip
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_half_written_line_of_the_log_is_dropped(tmp_path):
    log = MetricsLog(tmp_path)
    log.rewind(0)
    log.write(1, "warmup", {"loss": 1.0})
    log.write(2, "warmup", {"loss": 2.0})
    log.close()
    path = tmp_path / "metrics.jsonl"
    half = json.dumps({"step": 3, "phase": "warmup", "loss": 3.0})[:20]
    path.write_text(path.read_text() + half)
    log = MetricsLog(tmp_path)
    log.rewind(5)
    log.write(3, "warmup", {"loss": 3.0})
    log.close()
    assert _steps(tmp_path) == [1, 2, 3]


def test_rewinding_to_the_start_empties_the_log(tmp_path):
    log = MetricsLog(tmp_path)
    log.rewind(0)
    log.write(1, "warmup", {"loss": 1.0})
    log.rewind(0)
    log.close()
    assert _steps(tmp_path) == []
