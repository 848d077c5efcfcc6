"""`config.json` of the supported Hugging Face families, read and written. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from models.config import ModelConfig, RopeScaling


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What `config.json` leaves unsaid for one model_type (defaults of transformers 5)."""

    architecture: str
    rope_theta: float = 10000.0
    tied_embeddings: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    head_size: int | None = None
    """None: width / heads."""
    sliding_window: int | None = None
    """Keys that attention sees where `config.json` does not say [tokens]; None: all."""
    no_rope_interval: int | None = None
    """Every so-manieth layer has no rotary encoding, unless `no_rope_layers` says otherwise."""


FAMILIES: dict[str, Family] = {
    "llama": Family(architecture="LlamaForCausalLM"),
    "mistral": Family(architecture="MistralForCausalLM", sliding_window=4096),
    "qwen2": Family(architecture="Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family(architecture="Qwen3ForCausalLM", qk_norm=True, head_size=128),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        rope_theta=2000000.0,
        tied_embeddings=True,
        no_rope_interval=4,
    ),
}


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def parse_config(content: dict[str, Any]) -> ModelConfig:
    """The architecture that a `config.json` describes.

    Raises: ValueError naming the entry that is missing or that this code does not compute.
    """
    name = content.get("model_type")
    _check(
        name in FAMILIES,
        f"config.json: model_type={name!r} is not supported; supported are {sorted(FAMILIES)}",
    )
    family = FAMILIES[str(name)]
    _refuse_unsupported(content, family)
    width, heads = _integer(content, "hidden_size"), _integer(content, "num_attention_heads")
    default_kv = heads if name == "llama" else None
    return ModelConfig(
        family=str(name),
        vocab_size=_integer(content, "vocab_size"),
        width=width,
        num_layers=_integer(content, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_integer(content, "num_key_value_heads", default_kv),
        head_size=_integer(content, "head_dim", family.head_size or width // heads),
        ffw_size=_integer(content, "intermediate_size"),
        max_positions=_integer(content, "max_position_embeddings", 2048),
        rope_theta=_number(_rope(content), "rope_theta", family.rope_theta),
        rope_scaling=_rope_scaling(content),
        norm_eps=_number(content, "rms_norm_eps", 1e-6),
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias,
        tied_embeddings=bool(content.get("tie_word_embeddings", family.tied_embeddings)),
        no_rope_layers=_no_rope_layers(content, family),
        bos_token_id=content.get("bos_token_id"),
        eos_token_ids=_eos_token_ids(content),
    )


def _integer(content: dict[str, Any], key: str, default: int | None = None) -> int:
    value = content.get(key)
    value = default if value is None else value
    _check(
        isinstance(value, int) and value > 0,
        f"config.json: {key}={value!r} must be a positive whole number",
    )
    return int(value)  # pyright: ignore[reportArgumentType]


def _number(content: dict[str, Any], key: str, default: float) -> float:
    value = content.get(key, default)
    _check(
        isinstance(value, int | float) and not isinstance(value, bool) and value > 0,
        f"config.json: {key}={value!r} must be a positive number",
    )
    return float(value)


def _refuse_unsupported(content: dict[str, Any], family: Family) -> None:
    """Refuse what would silently be computed differently."""
    architectures = content.get("architectures") or [family.architecture]
    _check(
        architectures == [family.architecture],
        f"config.json: architectures={architectures} is not supported; "
        f"model_type={content['model_type']} must be {family.architecture}",
    )
    _check(
        content.get("hidden_act", "silu") == "silu",
        f"config.json: hidden_act={content.get('hidden_act')!r} is not supported, only 'silu'",
    )
    for key in ("attention_bias", "mlp_bias", "quantization_config", "use_sliding_window"):
        _check(not content.get(key), f"config.json: {key}={content.get(key)!r} is not supported")
    window = content.get("sliding_window", family.sliding_window)
    longest = content.get("max_position_embeddings", 2048)
    windowed = content["model_type"] == "mistral" and window is not None and window < longest
    windowed |= "sliding_attention" in (content.get("layer_types") or ())
    _check(
        not windowed,
        f"config.json: sliding window attention (sliding_window={window}) is not supported; "
        "use a checkpoint with full attention",
    )


_ROPE_KEYS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    },
    "yarn": {
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate",
        "attention_factor", "mscale", "mscale_all_dim",
    },
}  # fmt: skip
"""Entries that each type of rope scaling may have, besides its type, base and rotated share."""


def _rope(content: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings in one dictionary: v5 `rope_parameters`, or v4 `rope_scaling` and
    `rope_theta`."""
    rope = {key: content[key] for key in ("rope_theta",) if content.get(key) is not None}
    scaling = content.get("rope_scaling") or content.get("rope_parameters") or {}
    _check(
        isinstance(scaling, dict),
        f"config.json: rope scaling {scaling!r:.80} is no object of settings",
    )
    rope |= scaling
    kind = rope.setdefault("rope_type", rope.get("type", "default"))
    _check(
        kind in _ROPE_KEYS,
        f"config.json: rope scaling of type {kind!r} is not supported; supported are "
        f"{sorted(_ROPE_KEYS)}",
    )
    partial = rope.get("partial_rotary_factor", content.get("partial_rotary_factor", 1.0))
    _check(partial in (None, 1.0), f"config.json: partial_rotary_factor={partial} is not supported")
    common = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    unknown = sorted(set(rope) - _ROPE_KEYS[kind] - common)
    _check(
        not unknown,
        f"config.json: rope scaling of type {kind!r} has {unknown}, which is not supported; "
        f"it may have {sorted(_ROPE_KEYS[kind])}",
    )
    return rope


def _rope_scaling(content: dict[str, Any]) -> RopeScaling | None:
    rope = _rope(content)
    kind = rope["rope_type"]
    if kind == "default":
        return None
    required = {"linear": ("factor",), "yarn": ("factor",)}.get(
        kind, ("factor", "low_freq_factor", "high_freq_factor")
    )
    for key in required:
        value = rope.get(key)
        _check(
            isinstance(value, int | float) and not isinstance(value, bool),
            f"config.json: rope scaling of type {kind!r} needs a number {key}, not {value!r}",
        )
    factor = float(rope["factor"])
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    longest = _integer(content, "max_position_embeddings", 2048)
    original = int(rope.get("original_max_position_embeddings") or longest)
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=factor,
            original_max_positions=original,
            low_frequency_factor=float(rope["low_freq_factor"]),
            high_frequency_factor=float(rope["high_freq_factor"]),
        )
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_positions=original,
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        truncate=bool(rope.get("truncate", True)),
        attention_factor=_attention_factor(rope, factor),
    )


def _attention_factor(rope: dict[str, Any], factor: float) -> float:
    """What yarn multiplies cosine and sine by: 0.1 ln(factor) + 1 (arXiv:2309.00071 eq. 22), or as
    told."""

    def softer(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return softer(rope["mscale"]) / softer(rope["mscale_all_dim"])
    return softer(1.0)


def _render_rope(config: ModelConfig) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` for transformers 4 and vLLM, `rope_parameters` for
    transformers 5."""
    scaling = config.rope_scaling
    if scaling is None:
        entries: dict[str, Any] = {"rope_type": "default"}
    else:
        entries = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind != "linear":
            entries["original_max_position_embeddings"] = scaling.original_max_positions
        if scaling.kind == "llama3":
            entries["low_freq_factor"] = scaling.low_frequency_factor
            entries["high_freq_factor"] = scaling.high_frequency_factor
        if scaling.kind == "yarn":
            entries |= {
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "truncate": scaling.truncate,
                "attention_factor": scaling.attention_factor,
            }
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else dict(entries),
        "rope_parameters": {**entries, "rope_theta": config.rope_theta},
    }


def _no_rope_layers(content: dict[str, Any], family: Family) -> tuple[int, ...]:
    """Layers whose entry in `no_rope_layers` is 0 (1 means "rotates"), or every n-th one."""
    if family.no_rope_interval is None:
        return ()
    num_layers = _integer(content, "num_hidden_layers")
    switches = content.get("no_rope_layers")
    if switches is None:
        interval = _integer(content, "no_rope_layer_interval", family.no_rope_interval)
        switches = [int((i + 1) % interval != 0) for i in range(num_layers)]
    _check(
        len(switches) == num_layers,
        f"config.json: no_rope_layers has {len(switches)} entries for {num_layers} layers",
    )
    return tuple(i for i, rotates in enumerate(switches) if not rotates)


def _eos_token_ids(content: dict[str, Any]) -> tuple[int, ...]:
    eos = content.get("eos_token_id")
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    _check(
        all(type(i) is int and i >= 0 for i in ids),
        f"config.json: eos_token_id={eos!r} must be a token id, or a list of them",
    )
    return tuple(ids)


def render_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` that `parse_config` reads back and transformers loads.

    Raises: ValueError when the family cannot express the architecture.
    """
    _check(
        config.family in FAMILIES,
        f"family={config.family!r} has no Hugging Face form; use one of {sorted(FAMILIES)}",
    )
    family = FAMILIES[config.family]
    fitting = [
        name
        for name, other in FAMILIES.items()
        if (other.qk_norm, other.qkv_bias) == (config.qk_norm, config.qkv_bias) and config.gated_mlp
    ]
    for field, ours, theirs in (
        ("gated_mlp", config.gated_mlp, True),
        ("qk_norm", config.qk_norm, family.qk_norm),
        ("qkv_bias", config.qkv_bias, family.qkv_bias),
    ):
        _check(
            ours == theirs,
            f"family={config.family} has {field}={theirs}, but the policy has {ours}; "
            f"families that fit: {fitting or 'none'}",
        )
    _check(
        not config.no_rope_layers or family.no_rope_interval is not None,
        f"no_rope_layers={config.no_rope_layers} needs family=smollm3, not {config.family}",
    )
    content: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.ffw_size,
        "max_position_embeddings": config.max_positions,
        **_render_rope(config),
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        "pad_token_id": None,
        "torch_dtype": dtype,
    }
    if family.sliding_window is not None:
        content["sliding_window"] = None
    if family.no_rope_interval is not None:
        off = config.no_rope_layers
        content["no_rope_layers"] = [int(i not in off) for i in range(config.num_layers)]
    return content
