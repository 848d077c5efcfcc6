"""Hugging Face folders: names, layouts, pieces, and refusals."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models.config import ModelConfig, RopeScaling
from models.decoder import hidden_states
from models.fused import fused
from models.head import head_logits
from models.hf import load, load_fused, load_policy, read_config, save_policy
from models.sharding import fused_shardings, make_mesh, map_parameters, policy_shardings

F32 = jnp.float32
LOGIT_ATOL = 2e-5  # float32 against float64 numpy; logits are of order 3
TINY = ModelConfig(
    vocab_size=61,
    width=32,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_size=16,
    ffw_size=48,
    norm_eps=1e-6,
    bos_token_id=1,
    eos_token_ids=(2, 5),
)
FAMILIES = {
    "llama": replace(TINY, tied_embeddings=False),
    "llama3": replace(
        TINY,
        rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_max_positions=512),
    ),
    "mistral": replace(TINY, family="mistral", tied_embeddings=False, rope_theta=1e6),
    "qwen2": replace(TINY, family="qwen2", qkv_bias=True),
    "qwen2_yarn": replace(
        TINY,
        family="qwen2",
        qkv_bias=True,
        rope_scaling=RopeScaling(
            kind="yarn",
            factor=4.0,
            original_max_positions=512,
            attention_factor=1.1,
            truncate=False,
        ),
    ),
    "qwen3": replace(TINY, family="qwen3", qk_norm=True),
    "smollm3": replace(TINY, family="smollm3", no_rope_layers=(3,), rope_theta=2e6),
}


def make(config):
    """Noise in every parameter, norms and biases too."""
    rng = np.random.default_rng(0)

    def noise(name, abstract):
        value = 0.3 * rng.standard_normal(abstract.shape, np.float32) + ("norm" in name)
        return jnp.asarray(value)

    return map_parameters(noise, config)


@jax.jit
def logits_of(policy, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = hidden_states(policy, tokens, positions, jnp.ones_like(tokens), dtype=F32)
    return head_logits(policy, hidden, dtype=F32)


def equal(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def numpy_logits(weights, config, tokens):
    """The decoder restated on one sequence from the checkpoint's own names, in float64."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    n, k, h = config.num_heads, config.num_kv_heads, config.head_size

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * w[name + ".weight"]

    def rope(x):
        angle = np.arange(len(tokens))[:, None] * config.rope_theta ** (-np.arange(0, h, 2) / h)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = x[..., : h // 2], x[..., h // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x = w["model.embed_tokens.weight"][tokens]
    for i in range(config.num_layers):
        p = f"model.layers.{i}."
        y, qkv = norm(x, p + "input_layernorm"), {}
        for name, heads in (("q", n), ("k", k), ("v", k)):
            z = y @ w[p + f"self_attn.{name}_proj.weight"].T
            z = (z + w.get(p + f"self_attn.{name}_proj.bias", 0.0)).reshape(-1, heads, h)
            if config.qk_norm and name != "v":
                z = norm(z, p + f"self_attn.{name}_norm")
            if name != "v" and i not in config.no_rope_layers:
                z = rope(z)
            qkv[name] = np.repeat(z, n // heads, axis=1)
        scores = np.einsum("tnh,snh->nts", qkv["q"], qkv["k"]) / np.sqrt(h)
        scores[:, np.triu(np.ones((len(tokens),) * 2, bool), 1)] = -np.inf
        attention = np.exp(scores - scores.max(-1, keepdims=True))
        attention /= attention.sum(-1, keepdims=True)
        heads = np.einsum("nts,snh->tnh", attention, qkv["v"]).reshape(len(tokens), n * h)
        x = x + heads @ w[p + "self_attn.o_proj.weight"].T
        y = norm(x, p + "post_attention_layernorm")
        gate = y @ w[p + "mlp.gate_proj.weight"].T
        inner = gate / (1 + np.exp(-gate)) * (y @ w[p + "mlp.up_proj.weight"].T)
        x = x + inner @ w[p + "mlp.down_proj.weight"].T
    return norm(x, "model.norm") @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


@pytest.fixture
def folder(tmp_path):
    save_policy(make(TINY), tmp_path)
    return tmp_path


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_policy_loads_back_bitwise(family, tmp_path):
    policy = make(FAMILIES[family])
    save_policy(policy, tmp_path)
    assert read_config(tmp_path) == policy.config
    assert equal(load_policy(tmp_path), policy)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_load_as_a_sampler_holds_them(family, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "PIECE_BYTES", 600)
    policy = make(FAMILIES[family])
    save_policy(policy, tmp_path)
    places = fused_shardings(policy.config, make_mesh(jax.devices()[:1]))
    loaded = load_fused(tmp_path, policy.config, dtype=F32, shardings=places)
    assert equal(loaded, fused(policy))


@pytest.mark.parametrize("family", ["qwen2", "smollm3"])
def test_logits_equal_a_numpy_restatement_on_the_checkpoint_names(family, tmp_path):
    policy = make(FAMILIES[family])
    save_policy(policy, tmp_path)
    tokens = np.arange(7, 20)
    expected = numpy_logits(load_file(tmp_path / "model.safetensors"), policy.config, tokens)
    got = logits_of(load_policy(tmp_path), jnp.asarray(tokens, jnp.int32)[None])[0]
    np.testing.assert_allclose(got, expected, atol=LOGIT_ATOL, rtol=1e-5)


def test_bfloat16_survives_the_round_trip(tmp_path):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make(TINY))
    save_policy(half, tmp_path)
    back = load_policy(tmp_path, dtype=jnp.bfloat16)
    assert back.embedding.dtype == jnp.bfloat16
    assert equal(back, half)


def test_weights_load_straight_into_their_shardings(folder):
    mesh = make_mesh(jax.devices()[:8], data=1, fsdp=4, tensor=2)
    shardings = policy_shardings(TINY, mesh)
    sharded = load_policy(folder, shardings=shardings)
    assert sharded.layers.q.sharding == shardings.layers.q
    assert equal(jax.device_get(sharded), jax.device_get(make(TINY)))


def test_a_policy_saved_in_several_files_loads_like_one_file(tmp_path):
    save_policy(make(TINY), tmp_path, max_file_bytes=30_000)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all((tmp_path / name).stat().st_size < 40_000 for name in files)
    assert equal(load_policy(tmp_path), make(TINY))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * TINY.num_parameters
    (tmp_path / files[1]).unlink()
    with pytest.raises(ValueError, match=files[1]):
        load_policy(tmp_path)


def test_a_tensor_that_the_index_promises_but_its_file_lacks_is_named(tmp_path):
    save_policy(make(TINY), tmp_path, max_file_bytes=30_000)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = sorted(content["weight_map"].values())[-1]
    index.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"tensor model\.norm\.weight is missing from .*safetensors"
    ):
        load_policy(tmp_path)
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": 3}}))
    with pytest.raises(ValueError, match=r"index\.json has no weight_map of file names"):
        load_policy(tmp_path)


@pytest.mark.parametrize(("family", "devices"), [("qwen3", 1), ("qwen2", 4)])
def test_pieces_smaller_than_a_tensor_make_the_same_arrays(family, devices, tmp_path, monkeypatch):
    config = FAMILIES[family]
    save_policy(make(config), tmp_path)
    monkeypatch.setattr(load, "PIECE_BYTES", 1000)
    mesh = make_mesh(jax.devices()[:devices], fsdp=devices // 2 or 1, tensor=min(devices, 2))
    loaded = load_policy(tmp_path, shardings=policy_shardings(config, mesh))
    assert equal(jax.device_get(loaded), jax.device_get(make(config)))


def test_replicas_own_their_memory_and_may_be_donated(folder):
    mesh = make_mesh(jax.devices()[:2], data=2)
    policy = load_policy(folder, shardings=policy_shardings(TINY, mesh))
    add_one = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)
    changed = add_one(policy)
    for device in range(2):
        local = jax.tree.map(lambda x, i=device: x.addressable_data(i), changed)
        assert equal(local, jax.tree.map(lambda x: x + 1, make(TINY)))


def test_a_head_stored_beside_tied_embeddings_is_accepted(folder):
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    save_file(weights, folder / "model.safetensors")
    assert equal(load_policy(folder), make(TINY))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.layers.2.mlp.up_proj.weight"), r"layers\.2\.mlp\.up_proj.*missing"),
        (
            lambda w: w.update({"model.extra": w["model.norm.weight"]}),
            r"model\.extra is in the che",
        ),
        (
            lambda w: w.update({"model.norm.weight": np.zeros(7, np.float32)}),
            r"model\.norm\.weight .* has shape \[7\], but config\.json implies \[32\]",
        ),
        (
            lambda w: w.update({"model.norm.weight": np.zeros(32, np.int8)}),
            r"model\.norm\.weight .* has dtype I8; supported are \['BF16', 'F16', 'F32'\]",
        ),
    ],
    ids=["missing", "unexpected", "wrong shape", "wrong dtype"],
)
def test_weights_that_do_not_fit_are_refused_by_tensor_name(folder, change, message):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_policy(folder)


@pytest.mark.parametrize("keep", [4, 1000, -1000])
def test_a_truncated_file_is_refused_by_file_name(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        load_policy(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma2"}, "model_type='gemma2' is not supported; supported are"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures="),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "of type 'dynamic' is not supported",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "needs a number low_freq_factor",
        ),
        ({"rope_scaling": {"type": "yarn"}}, "needs a number factor, not None"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, r"factor=0\.5 must be at least 1"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "mrope_section": [1]}}, "mrope_section"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5"),
        ({"layer_types": ["sliding_attention"]}, "sliding window"),
        ({"hidden_size": None}, "hidden_size=None must be a positive whole number"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rms_norm_eps": None}, "rms_norm_eps=None must be a positive number"),
        ({"rope_theta": "1e4", "rope_parameters": None}, "rope_theta='1e4' must be a positive"),
        ({"rope_scaling": [8.0]}, r"rope scaling \[8\.0\] is no object"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>' must be a token id"),
    ],
)
def test_what_would_be_computed_differently_is_refused(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        read_config(folder)


def test_old_and_new_places_of_the_rope_base_are_both_read(folder):
    edit_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 123.0})
    assert read_config(folder).rope_theta == 123.0
    edit_config(folder, rope_parameters=None, rope_theta=456.0)
    assert read_config(folder).rope_theta == 456.0


def test_smollm3_without_a_list_switches_rope_off_in_every_fourth_layer(tmp_path):
    save_policy(make(FAMILIES["smollm3"]), tmp_path)
    edit_config(tmp_path, no_rope_layers=None, num_hidden_layers=9)
    assert read_config(tmp_path).no_rope_layers == (3, 7)


def test_files_that_are_absent_or_malformed_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        read_config(tmp_path)
    with pytest.raises(ValueError, match=r"holds neither model\.safetensors nor"):
        load_policy(tmp_path, TINY)


@pytest.mark.parametrize("change", [{"qk_norm": True}, {"gated_mlp": False}, {"family": "mine"}])
def test_architectures_without_a_hugging_face_form_are_not_saved(tmp_path, change):
    with pytest.raises(ValueError, match="family="):
        save_policy(make(replace(TINY, **change)), tmp_path)
    assert not list(tmp_path.iterdir())
