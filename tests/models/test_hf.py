"""Hugging Face folders: names, layouts, refusals, and a real trained model."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models.cache import init_cache
from models.config import ModelConfig
from models.decoder import Decoder, decode_step, hidden_states
from models.head import head_logits
from models.hf import load_policy, read_config, save_policy
from models.sharding import make_mesh, policy_shardings

F32 = jnp.float32
LOGIT_ATOL = 2e-5  # float32 against float64 numpy; logits are of order 3
TORCH_ATOL = 2e-5  # float32 against float32 torch, another order of sums
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
    "mistral": replace(TINY, family="mistral", tied_embeddings=False, rope_theta=1e6),
    "qwen2": replace(TINY, family="qwen2", qkv_bias=True),
    "qwen3": replace(TINY, family="qwen3", qk_norm=True),
    "smollm3": replace(TINY, family="smollm3", no_rope_layers=(3,), rope_theta=2e6),
}


def make(config):
    policy = Decoder(config, jax.random.key(0))
    leaves, tree = jax.tree.flatten(policy)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noisy)


def logits_of(policy, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = hidden_states(policy, tokens, positions, jnp.ones_like(tokens), dtype=F32)
    return head_logits(policy, hidden, dtype=F32)


def equal(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool(jnp.all(x == y)), a, b))


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


def test_an_index_of_several_files_loads_like_one_file(folder):
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, folder / file)
    listed = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    (folder / "model.safetensors").unlink()
    assert equal(load_policy(folder), make(TINY))
    (folder / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"b\.safetensors"):
        load_policy(folder)


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
    ],
    ids=["missing", "unexpected", "wrong shape"],
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
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "scaling of type 'llama3'"),
        ({"rope_scaling": {"type": "yarn"}}, "scaling of type 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "of type 'linear'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5"),
        ({"layer_types": ["sliding_attention"]}, "sliding window"),
        ({"hidden_size": None}, "hidden_size=None must be a positive whole number"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
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


def test_greedy_decoding_of_stories260k_gives_the_published_tokens(shared_data):
    source = shared_data / "weights" / "stories260K"
    expected = json.loads((source / "expected_greedy.json").read_text())["token_ids"]
    policy = load_policy(source)

    @jax.jit
    def generate(policy):
        def step(carry, position):
            cache, token = carry
            hidden, cache = decode_step(policy, cache, token, position[None], dtype=F32)
            logits = head_logits(policy, hidden, dtype=F32)
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            return (cache, token), token[0]

        start = init_cache(policy.config, 1, len(expected), F32), jnp.array([expected[0]])
        return jax.lax.scan(step, start, jnp.arange(len(expected) - 1))[1]

    assert generate(policy).tolist() == expected[1:]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(family, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    policy = make(FAMILIES[family])
    save_policy(policy, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = np.arange(40).reshape(2, 20) + 3
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    got = logits_of(policy, jnp.asarray(tokens, jnp.int32))
    np.testing.assert_allclose(got, expected, atol=TORCH_ATOL, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    assert equal(load_policy(tmp_path / "theirs"), policy)
