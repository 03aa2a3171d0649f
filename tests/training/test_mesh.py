import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from trees import assert_trees_equal

from cipo_jax.errors import UserError
from cipo_jax.models.decoder import DecoderConfig, abstract_params, decoding_layout
from cipo_jax.training.mesh import (
    _DECODING_RULES,
    AXES,
    batch_sharding,
    decoding_shardings,
    make_mesh,
    param_shardings,
    replicated,
)

_VARIANTS = [
    {"tied_head": True},
    {"tied_head": False},
    {"tied_head": True, "qkv_bias": True},
    {"tied_head": False, "qk_norm": "head"},
    {"tied_head": False, "qkv_bias": True, "qk_norm": "head"},
    {"tied_head": True, "qkv_bias": True, "o_bias": True, "mlp_bias": True},
    {"tied_head": False, "qk_norm": "all", "post_norm": True},
]


def _config(**changes) -> DecoderConfig:
    sizes = {
        "vocab_size": 64,
        "d_model": 32,
        "d_ff": 48,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
    }
    return DecoderConfig(**(sizes | changes))


def _decoding_shapes(config):
    return jax.eval_shape(lambda p: decoding_layout(config, p, "float32"), abstract_params(config))


def _named(tree) -> dict:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


@pytest.mark.parametrize(
    ("asked", "got"),
    [
        ((8, 1, 1), (8, 1, 1)),
        ((2, 2, 2), (2, 2, 2)),
        ((1, 4, 2), (1, 4, 2)),
        ((-1, 1, 1), (8, 1, 1)),
        ((2, -1, 2), (2, 2, 2)),
        ((2, 1, -1), (2, 1, 4)),
        ((-1, 4, 2), (1, 4, 2)),
    ],
)
def test_mesh_has_the_sizes_asked_for(asked, got):
    mesh = make_mesh(*asked)
    assert dict(mesh.shape) == dict(zip(AXES, got, strict=True))
    assert set(mesh.devices.flat) == set(jax.devices())


def test_mesh_of_chosen_devices_holds_these_alone():
    chosen = jax.devices()[2:6]
    mesh = make_mesh(-1, 1, 2, devices=chosen)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 2}
    assert set(mesh.devices.flat) == set(chosen)


def test_default_mesh_is_data_parallel_over_every_device():
    assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1), (3, 1, 1), (4, 4, 1), (-1, 3, 1), (2, 2, 4), (-1, -1, 2), (-1, 16, 1), (-1, 0, 1)],
)
def test_sizes_that_do_not_cover_the_devices_are_a_user_error(sizes):
    with pytest.raises(UserError, match=r"config\.mesh"):
        make_mesh(*sizes)


@pytest.mark.parametrize("variant", _VARIANTS)
@pytest.mark.parametrize("layout", ["training", "decoding"])
def test_every_parameter_has_a_rule_that_fits_its_shape(variant, layout):
    config, mesh = _config(**variant), make_mesh(2, 2, 2)
    if layout == "training":
        shapes = abstract_params(config)
        shardings = param_shardings(shapes, mesh)
    else:
        shapes = _decoding_shapes(config)
        shardings = decoding_shardings(shapes, mesh)
    shapes, shardings = _named(shapes), _named(shardings)
    assert shapes.keys() == shardings.keys()
    for name, shape in shapes.items():
        spec = shardings[name].spec
        assert len(spec) <= len(shape.shape), name
        # What is not a vector must be cut over the tensor axis, or tensor parallelizm saves
        # nothing; a norm's scale is small and is kept whole.
        axes = {axis for axis in spec if axis is not None}
        if name.endswith("['scale']"):
            assert not axes, name
        elif name.endswith(("['o']['bias']", "['down']['bias']")):
            # It is added to a sum over what tensor splits.
            assert axes == ({"fsdp"} if layout == "training" else set()), name
        elif name.endswith("['bias']") or layout == "decoding":
            assert axes == {"tensor"}, name
        else:
            assert axes == {"tensor", "fsdp"}, name


def test_training_rules_cut_the_intended_dimensions():
    config, mesh = _config(tied_head=False, qkv_bias=True), make_mesh(1, 4, 2)
    shardings = param_shardings(abstract_params(config), mesh)
    block = shardings["layers"]["block"]

    def local(sharding, *shape):
        return sharding.shard_shape(shape)

    assert local(shardings["embed"], 64, 32) == (32, 8)
    assert local(shardings["head"], 32, 64) == (8, 32)
    assert local(block["q"]["kernel"], 2, 32, 4, 8) == (2, 8, 2, 8)
    assert local(block["k"]["bias"], 2, 2, 8) == (2, 1, 8)
    assert local(block["o"]["kernel"], 2, 4, 8, 32) == (2, 2, 8, 8)
    assert local(block["gate"]["kernel"], 2, 32, 48) == (2, 8, 24)
    assert local(block["down"]["kernel"], 2, 48, 32) == (2, 24, 8)


@pytest.mark.parametrize(
    ("changes", "mesh", "parameter", "axis"),
    [
        ({"kv_heads": 1}, (4, 1, 2), "layers/block/k/kernel", "tensor"),
        ({"d_ff": 50}, (2, 1, 4), "layers/block/down/kernel", "tensor"),
        ({"d_model": 36}, (1, 8, 1), "embed", "fsdp"),
    ],
)
def test_a_dimension_that_does_not_divide_names_parameter_and_axis(changes, mesh, parameter, axis):
    # With 4 KV heads nothing but the changed size fails to divide.
    config = _config(**({"kv_heads": 4} | changes))
    with pytest.raises(UserError) as raised:
        param_shardings(abstract_params(config), make_mesh(*mesh))
    assert parameter in str(raised.value)
    assert f"config.mesh.{axis}" in str(raised.value)


@pytest.mark.parametrize("vocabulary", [63, 66])
def test_a_vocabulary_that_tensor_does_not_divide_is_not_split(vocabulary):
    config = _config(tied_head=False, vocab_size=vocabulary, kv_heads=4)
    mesh = make_mesh(1, 2, 4)
    shardings = param_shardings(abstract_params(config), mesh)
    assert shardings["embed"].shard_shape((vocabulary, 32)) == (vocabulary, 16)
    assert shardings["head"].shard_shape((32, vocabulary)) == (16, vocabulary)
    decoding = decoding_shardings(_decoding_shapes(config), mesh)
    assert decoding["embed"].shard_shape((vocabulary, 32)) == (vocabulary, 32)
    assert decoding["head"].shard_shape((32, vocabulary)) == (32, vocabulary)
    # Everything else is split as ever.
    assert shardings["layers"]["block"]["q"]["kernel"].shard_shape((2, 32, 4, 8)) == (2, 16, 1, 8)


def test_the_decoding_layout_is_checked_too():
    config = _config(kv_heads=1)
    with pytest.raises(UserError, match=r"config\.mesh\.tensor.*k/kernel"):
        decoding_shardings(_decoding_shapes(config), make_mesh(4, 1, 2))


def test_decoding_rules_are_those_of_training_without_layers_axis_and_fsdp():
    assert dict(_DECODING_RULES) == {
        r"embed$": PartitionSpec("tensor", None),
        r"head$": PartitionSpec(None, "tensor"),
        r"layers/.*/[qkv]/kernel$": PartitionSpec(None, "tensor", None),
        r"layers/.*/[qkv]/bias$": PartitionSpec("tensor", None),
        r"layers/.*/o/kernel$": PartitionSpec("tensor", None, None),
        r"layers/.*/(gate|up)/kernel$": PartitionSpec(None, "tensor"),
        r"layers/.*/(gate|up)/bias$": PartitionSpec("tensor"),
        r"layers/.*/down/kernel$": PartitionSpec("tensor", None),
        r"layers/.*/(o|down)/bias$": PartitionSpec(),
        r"scale$": PartitionSpec(),
    }


def test_a_parameter_without_a_rule_is_refused():
    shapes = {"novel": jax.ShapeDtypeStruct((4, 4), np.float32)}
    with pytest.raises(KeyError, match="novel"):
        param_shardings(shapes, make_mesh())


def test_batch_rows_lie_over_data_and_fsdp():
    mesh = make_mesh(2, 2, 2)
    assert batch_sharding(mesh).spec == PartitionSpec(("data", "fsdp"))
    assert batch_sharding(mesh).shard_shape((8, 3)) == (2, 3)
    assert replicated(mesh).shard_shape((8, 3)) == (8, 3)


def test_parameters_can_be_placed_by_both_tables():
    config = _config(
        tied_head=False, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm="all", post_norm=True
    )
    mesh = make_mesh(2, 2, 2)
    params = jax.tree.map(
        lambda x: jax.device_put(np.arange(x.size, dtype=np.float32).reshape(x.shape)),
        abstract_params(config),
    )
    decoding = decoding_layout(config, params, "float32")
    for tree, shardings in (
        (params, param_shardings(params, mesh)),
        (decoding, decoding_shardings(decoding, mesh)),
    ):
        placed = jax.device_put(tree, shardings)
        assert_trees_equal(placed, tree)
