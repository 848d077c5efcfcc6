"""The few settings of a run that its speed depends on, read from its YAML file.

Sections, names and defaults are those of `jaxrl.config` (a test compares them). Other keys of the file
say nothing about speed and are left alone, unless they look like a misspelt one of these.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from models.config import ALL_LINEAR, Lora, ModelConfig
from models.rows import PrefixRows, RowAttention, SharedPrompts
from roofline import model_zoo
from roofline.cost import Remat
from roofline.hardware import Hardware
from roofline.machine import Workload
from roofline.names import meant

MISSPELT = 0.85
"""Similarity from which an unknown key is taken for a misspelt one."""
MAY_BE_ZERO = frozenset({
    "task.reward_workers", "train.shared_prompt_tokens", "lora.rank", "rollout.max_staleness",
    "rollout.shared_prefix", "grpo.refill_rounds",
})  # fmt: skip
"""Whole numbers that may be 0, which means none; the others count from 1."""
_ROOT = Path(__file__).resolve().parents[1]
CONFIG_FOLDERS = (_ROOT / "configs", _ROOT / "jaxrl" / "configs")
"""Where a name is looked up after the literal path: the checkout, then the installed package."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSettings:
    """Which policy."""

    path: str | None = None
    width: int = 128
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 32
    ffw_size: int = 384
    qk_norm: bool = True
    tied_embeddings: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    attention: Literal["auto", "blocks", "xla", "cudnn", "pallas"] = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSettings:
    """Verification."""

    reward_workers: int = 1
    reward_latency_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSettings:
    """Packing."""

    row_tokens: int = 64
    shared_prompt_tokens: int = 0
    row_parts: int = 1
    rows_per_microbatch: int = 64
    logprob_chunk_tokens: int = 4096

    @property
    def shared_prompts(self) -> SharedPrompts | None:
        """How rows are divided; None: samples bring their own prompts."""
        if not self.shared_prompt_tokens:
            return None
        return SharedPrompts(prompt_tokens=self.shared_prompt_tokens, parts=self.row_parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSettings:
    """An adapter in place of the weights; rank 0: none."""

    rank: int = 0
    alpha: float = 32.0
    targets: str = ALL_LINEAR


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutSettings:
    """The sampling engine."""

    slots: int = 128
    chunk_steps: int = 8
    max_prompt_tokens: int = 32
    max_new_tokens: int = 32
    max_staleness: int = 1
    cache_dtype: Literal["auto", "bfloat16", "float32", "int8", "float8_e4m3"] = "auto"
    shared_prefix: int = 0

    def prefixes(self, group: int) -> PrefixRows | None:
        """The shared prompts, each for up to `group` slots; None: there are none."""
        if not self.shared_prefix:
            return None
        return PrefixRows(rows=self.shared_prefix, lanes=group, tokens=self.max_prompt_tokens)

    def stored_dtype(self, compute: str) -> str:
        """Type of cached keys and values where the model computes in `compute`."""
        return compute if self.cache_dtype == "auto" else self.cache_dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class GrpoSettings:
    """The batch."""

    prompts_per_step: int = 16
    group_size: int = 8
    kl_weight: float = 0.0
    log_reference: bool = False
    minibatches: int = 1
    epochs: int = 1
    advantage_baseline: str = "mean"
    kl_in: str = "loss"
    ratio_from: str = "sampler"
    sequence_mask: str = "none"
    entropy_shaping: float = 0.0
    top_entropy_share: float = 1.0
    correction_denominator: str = "all"
    refill_rounds: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What a prediction of a whole optimizer step needs."""

    model: ModelSettings = field(default_factory=ModelSettings)
    task: TaskSettings = field(default_factory=TaskSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    grpo: GrpoSettings = field(default_factory=GrpoSettings)

    def rows_attention(self, hardware: Hardware, head_size: int, *, learner: bool) -> RowAttention:
        """Program of attention in packed rows (`learner`) or prompts: as set, or what the hardware takes
        unasked; kernels know no rows with shared prompts."""
        asked = self.model.attention
        unasked = hardware.rows_attention(self.model.dtype, head_size)
        chosen = unasked if asked == "auto" else asked
        shared = learner and self.train.shared_prompts is not None
        return "xla" if shared and chosen != "blocks" else chosen

    @property
    def samples_per_step(self) -> int:
        """P * G."""
        return self.grpo.prompts_per_step * self.grpo.group_size

    @property
    def max_tokens(self) -> int:
        """Longest sequence, the prompt included [tokens]."""
        return self.rollout.max_prompt_tokens + self.rollout.max_new_tokens

    @property
    def scores_reference(self) -> bool:
        """Whether a step scores its samples under a frozen reference."""
        return self.grpo.kl_weight != 0 or self.grpo.log_reference

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates on one batch of samples."""
        return self.grpo.minibatches * self.grpo.epochs

    @property
    def scoring_passes(self) -> int:
        """Forward passes over the batch beside those of training: by the learner, by the reference."""
        grpo = self.grpo
        later = self.updates_per_step > 1 and (
            grpo.ratio_from == "learner" or grpo.sequence_mask != "none" or grpo.entropy_shaping > 0
        )
        scores_first = (
            later
            or grpo.advantage_baseline == "value"
            or grpo.kl_in == "reward"
            or grpo.top_entropy_share < 1
            or grpo.correction_denominator == "kept"
        )
        return int(scores_first) + int(self.scores_reference)


def read_settings(name: str, words: Sequence[str] = ()) -> Settings:
    """Settings of a YAML file, of a name from configs/, or of a run folder; `words` such as
    "--rollout.slots=64" or "--rollout.slots", "64" win over it.

    Raises:
        ValueError: no such file, no YAML mapping, a misspelt key, or a value of another type.
    """
    path = _find(name)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds a {type(tree).__name__}; it must map sections to values")
    values = _flat(tree)
    settings = _filled(values, f"{path}: ", others_allowed=True)
    given = dict(parse_words(words))
    return settings if not given else _filled({**values, **given}, "", given=given)


def settings_from(tree: Mapping[str, Any]) -> Settings:
    """Settings out of a whole configuration as nested mappings (`dataclasses.asdict`).

    Raises:
        ValueError: a misspelt key, or a value of another type.
    """
    return _filled(_flat(tree), "", others_allowed=True)


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{key}": value
        for section, inner in tree.items()
        if isinstance(inner, Mapping)
        for key, value in inner.items()
    }


def parse_words(words: Sequence[str]) -> list[tuple[str, Any]]:
    """("section.key", value) of "--section.key=value" and "--section.key", "value".

    Raises:
        ValueError: a word is neither, or an option has no value.
    """
    pairs, left = [], list(words)
    while left:
        word = left.pop(0)
        if not word.startswith("--") or "." not in word:
            raise ValueError(f"unknown argument {word!r}; settings look like --rollout.slots=64")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not left:
                raise ValueError(f"{word} has no value")
            value = left.pop(0)
        pairs.append((key.replace("-", "_"), yaml.safe_load(value)))
    return pairs


def _find(name: str) -> Path:
    given = Path(name)
    places = [given, given / "config.yaml", *(folder / f"{name}.yaml" for folder in CONFIG_FOLDERS)]
    for place in places:
        if place.is_file():
            return place
    known = sorted({file.stem for folder in CONFIG_FOLDERS for file in folder.glob("*.yaml")})
    raise ValueError(
        f"no configuration {name!r}{meant(name, known)} Give a YAML file, a run folder or one of "
        f"{', '.join(known)}"
    )


def _filled(
    values: Mapping[str, Any],
    where: str,
    *,
    others_allowed: bool = False,
    given: Mapping[str, Any] | None = None,
) -> Settings:
    sections = {part.name: getattr(Settings(), part.name) for part in dataclasses.fields(Settings)}
    hints = {name: get_type_hints(type(section)) for name, section in sections.items()}
    known = {
        f"{name}.{item.name}": getattr(section, item.name)
        for name, section in sections.items()
        for item in dataclasses.fields(section)
    }
    for key in values:
        if key in known:
            continue
        near = difflib.get_close_matches(key, known, n=1, cutoff=MISSPELT if others_allowed else 0)
        if others_allowed and near and key.startswith(f"{near[0]}_"):
            continue  # a longer name of its own, such as entropy_shaping_bound
        if (others_allowed and near) or (given is not None and key in given):
            raise ValueError(f"{where}unknown setting {key}; did you mean {near[0]}?")
    chosen: dict[str, dict[str, Any]] = {name: {} for name in sections}
    for key, default in known.items():
        if key in values:
            section, _, name = key.partition(".")
            typed = _typed(values[key], default, f"{where}{key}")
            _check_range(key, typed, hints[section].get(name), where)
            chosen[section][name] = typed
    parts = {name: dataclasses.replace(sections[name], **chosen[name]) for name in sections}
    return Settings(**parts)


def _typed(value: Any, default: Any, where: str) -> Any:
    if default is None:
        return None if value is None else str(value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise ValueError(
            f"{where}={value!r} is a {type(value).__name__}; its type must be {type(default).__name__}"
        )
    return value


def _check_range(key: str, value: Any, hint: Any, where: str) -> None:
    """Raises: ValueError for a number below what it counts, or a word that is none of the choices."""
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    if choices and value not in choices:
        near = meant(str(value), choices)
        raise ValueError(f"{where}{key}={value!r} is not one of {', '.join(choices)}{near}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    least = 1 if isinstance(value, int) and key not in MAY_BE_ZERO else 0
    if not least <= value < math.inf:
        raise ValueError(f"{where}{key}={value} must be a number of at least {least}")


def check_rows(settings: Settings) -> None:
    """Raises: ValueError for packed rows that do not hold the longest sample, as training would."""
    train, rollout = settings.train, settings.rollout
    shared = train.shared_prompts
    longest, held = settings.max_tokens, train.row_tokens
    named = "rollout.max_prompt_tokens + rollout.max_new_tokens"
    least = longest
    if shared is not None:
        longest, held = rollout.max_new_tokens, shared.part_tokens(train.row_tokens)
        named, least = "rollout.max_new_tokens", shared.prompt_tokens + shared.parts * longest
    if held < longest:
        raise ValueError(
            f"train.row_tokens={train.row_tokens} holds {held} tokens of a sample, but {named} = "
            f"{longest}; set --train.row_tokens={least}"
        )


def workload_of(settings: Settings) -> Workload:
    """The shapes at which calibration measures a run's phases."""
    rollout, train = settings.rollout, settings.train
    return Workload(
        slots=rollout.slots,
        kv_len=settings.max_tokens,
        chunk_steps=rollout.chunk_steps,
        rows=train.rows_per_microbatch,
        row_tokens=train.row_tokens,
        chunk_tokens=train.logprob_chunk_tokens,
        dtype=settings.model.dtype,
        remat=settings.model.remat,
        reference=settings.scoring_passes > 0,
    )


def model_of(settings: Settings, vocab_size: int) -> ModelConfig:
    """Architecture of the policy; `vocab_size` where it is built from scratch for a tokenizer.

    Raises:
        ValueError: model.path has no readable config.json, or lora.* describes no adapter.
    """
    of = settings.lora
    lora = None if of.rank == 0 else Lora.of(of.rank, of.alpha, of.targets)
    return dataclasses.replace(_architecture(settings.model, vocab_size), lora=lora)


def _architecture(shape: ModelSettings, vocab_size: int) -> ModelConfig:
    if shape.path is not None:
        return model_zoo.find_model(shape.path).config
    return ModelConfig(
        family="qwen3", vocab_size=vocab_size, width=shape.width, num_layers=shape.num_layers,
        num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads, head_size=shape.head_size,
        ffw_size=shape.ffw_size, qk_norm=shape.qk_norm, tied_embeddings=shape.tied_embeddings,
    )  # fmt: skip
