import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations

from cipo_jax.data.batches import PadShape, TokenizedExample
from cipo_jax.models.decoder import Compute, DecoderConfig, abstract_params, hidden_states
from cipo_jax.training.mesh import make_mesh, param_shardings
from cipo_jax.training.policy import Policy
from cipo_jax.training.scoring import Scorer

CONFIG = DecoderConfig(
    vocab_size=64, d_model=32, d_ff=48, layers=2, heads=4, kv_heads=2, head_dim=8, tied_head=True
)
SHAPE = PadShape(24, 16)
# Log-probabilities are of order 10 nats; f32 rounds a few dozen sums of that size in another
# order, which is some 1e-6 each.
ATOL = 2e-5


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: rng.normal(0.0, 0.4, x.shape).astype(np.float32), abstract_params(CONFIG)
    )


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(1)
    sizes = [
        (1, 1),
        (8, 16),
        (3, 7),
        (5, 1),
        (1, 16),
        (7, 4),
        (2, 9),
        (8, 2),
        (4, 5),
        (6, 3),
        (1, 2),
    ]
    return [
        TokenizedExample(
            rng.integers(0, 64, prompt).tolist(), rng.integers(0, 64, completion).tolist()
        )
        for prompt, completion in sizes
    ]


@pytest.fixture(scope="module")
def expected(params, rows):
    """Each row by itself, unpadded in what is read: log_softmax of every position's logits."""

    @jax.jit
    def whole(tokens):
        logits = hidden_states(CONFIG, Compute(), params, tokens) @ params["embed"].T
        return jax.nn.log_softmax(logits)

    found = []
    for row in rows:
        ids = [*row.prompt, *row.completion]
        tokens = jnp.array([ids + [0] * (24 - len(ids))])
        at = np.arange(len(row.completion)) + len(row.prompt) - 1
        found.append(np.asarray(whole(tokens))[0, at, row.completion])
    return found


def _scorer(max_batch_size: int, mesh=None, chunk: int = 1024) -> Scorer:
    mesh = mesh or make_mesh(1, 1, 1, devices=jax.devices()[:1])
    return Scorer(Policy(CONFIG, Compute(logits_chunk=chunk)), mesh, max_batch_size)


def _assert_same(got, expected):
    assert [len(g) for g in got] == [len(e) for e in expected]
    for g, e in zip(got, expected, strict=True):
        np.testing.assert_allclose(g, e, rtol=1e-5, atol=ATOL)


@pytest.fixture(scope="module")
def fours():
    return _scorer(4)


@pytest.mark.parametrize("size", [1, 64])
def test_scores_equal_rows_by_themselves_in_batches_of_any_size(params, rows, expected, size):
    _assert_same(_scorer(size).token_logps(params, rows, SHAPE), expected)


def test_row_order_moves_scores_along_and_changes_none(fours, params, rows, expected):
    order = np.random.default_rng(2).permutation(len(rows))
    got = fours.token_logps(params, [rows[i] for i in order], SHAPE)
    _assert_same(got, [expected[i] for i in order])


def test_padded_sizes_change_no_score(params, rows, expected):
    _assert_same(_scorer(4).token_logps(params, rows, PadShape(40, 17)), expected)


def test_chunks_that_do_not_divide_the_tokens_change_no_score(params, rows, expected):
    _assert_same(_scorer(4, chunk=7).token_logps(params, rows, SHAPE), expected)


def test_an_eight_device_mesh_scores_like_one_device(params, rows, expected):
    mesh = make_mesh(2, 2, 2)
    placed = jax.device_put(params, param_shardings(params, mesh))
    # 6 rows do not divide over data x fsdp = 4; the scorer takes 8.
    scorer = _scorer(6, mesh)
    _assert_same(scorer.token_logps(placed, rows, SHAPE), expected)
    _assert_same(scorer.token_logps(placed, rows[:3], SHAPE), expected[:3])


def test_one_shape_means_one_compilation(params, rows):
    # Equal scorers are one program too; their chunk is like that of no other test.
    with compilations("_completion_logps") as compiled:
        for part in (rows, rows[:1], rows[3:10]):
            _scorer(4, chunk=501).token_logps(params, part, SHAPE)
    assert compiled.number == 1


def test_nothing_to_score(fours, params):
    assert fours.token_logps(params, [], SHAPE) == []
