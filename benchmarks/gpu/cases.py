"""What the suite measures and at which shapes. Loads no jax.

B rows, T tokens, S cached keys, P prompts, G samples per prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from models.config import ModelConfig
from roofline.cost import Remat
from roofline.machine import Workload

Kind = Literal[
    "calibrate", "decode", "prefill", "score", "train", "optimizer", "publish", "rollout", "grpo",
    "peers",
]  # fmt: skip
KINDS: tuple[Kind, ...] = get_args(Kind)
Peer = Literal["", "generate", "generate-static", "train", "train-compiled"]

WARM_UPS, MIN_ROUNDS, MAX_ROUNDS = 2, 5, 100
"""Calls before the timed ones (the first compiles), and how many are timed: a case's median is over them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One row of the results."""

    kind: Kind
    model: str
    rows: int = 0
    """decode: slots; prefill: prompts; score and train: packed rows."""
    tokens: int = 0
    """decode: tokens a slot has room for; else tokens of each row."""
    remat: Remat = "none"
    max_staleness: int = 0
    """grpo: 0 is synchronous."""
    peer: Peer = ""
    """peers: what transformers and PyTorch do."""
    attention: str = ""
    """decode, prefill, score, train: the program of attention (`models.attention`); empty: what auto takes
    on a device without measurements. Whole steps (rollout, grpo) take the fastest one measured so far."""
    cache_dtype: str = ""
    """decode: type of the cache as rollout.cache_dtype names it; empty: the compute dtype."""
    shares: bool = False
    """decode: a prompt's keys and values stand once for all slots that sample it, not in each."""

    @property
    def name(self) -> str:
        """Unique within a scale: `qwen3-0.6b train 8x2048 remat`."""
        words = [self.model, self.kind]
        if self.peer:
            words.append(self.peer)
        if self.rows:
            words.append(f"{self.rows}x{self.tokens}")
        if self.remat == "block":
            words.append("remat")
        words += [word for word in (self.attention, self.cache_dtype) if word]
        if self.shares:
            words.append("shared")
        if self.kind == "grpo":
            words.append("asynchronous" if self.max_staleness else "synchronous")
        return " ".join(words)

    @property
    def process(self) -> str:
        """Cases of one process follow one another in it; a process's peak memory is its largest case's."""
        share = {
            "prefill": "forward",
            "score": "forward",
            "optimizer": "learner",
            "publish": "learner",
        }
        return self.name if self.kind in ("grpo", "peers") else (
            f"{self.model} {share.get(self.kind, self.kind)}"
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """The shape of one GRPO step; the rollout alone is the same without training."""

    prompts: int
    """P."""
    group: int
    """G."""
    prompt_tokens: int
    new_tokens: int
    """Every completion has as many: random weights do not stop by themselves."""

    @property
    def samples(self) -> int:
        """P * G, as many as there are slots."""
        return self.prompts * self.group

    @property
    def length(self) -> int:
        """Tokens of a whole sequence."""
        return self.prompt_tokens + self.new_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """All shapes of one run of the suite."""

    name: Literal["gpu", "tiny"]
    models: Mapping[str, ModelConfig]
    dtype: Literal["bfloat16", "float32"]
    decode_first: tuple[tuple[int, int], ...]
    """(slots, tokens a slot has room for) of the figures to reach, measured with every program of attention."""
    decode: tuple[tuple[int, int], ...]
    """The other shapes, the smaller memory first."""
    decode_programs: tuple[str, ...]
    """Programs besides the one that a device without measurements takes."""
    decode_long: tuple[int, int]
    """Shape at which the first model is measured with every program and every type of the cache."""
    cache_dtypes: tuple[str, ...]
    row_programs: tuple[str, ...]
    """Other programs of attention in prefill and, at the largest packed shape, scoring and training with
    recomputation."""
    chunk_steps: int
    """Decode steps per program."""
    prefill: tuple[tuple[int, int], ...]
    """(prompts, tokens)."""
    packed: tuple[tuple[int, int], ...]
    """(rows, tokens of a row) of scoring and training, the smaller first."""
    sequence: int
    """Tokens of each sequence that is packed into rows; divides them."""
    chunk_tokens: int
    """Tokens whose logits exist at once in scoring and training."""
    rollout: Rollout
    seconds: float
    """Time spent on the repeats of a case [s]; at least MIN_ROUNDS are made."""
    calibration_s: float
    """Budget of one model's calibration [s]."""
    compiled_peers: bool
    """Also measure transformers with a static cache, which it compiles, and a compiled training step."""
    first_s: float
    """A case begins only if as much time is left as the longest of its kind took; this, while none has [s]."""
    longest_s: float
    """A case that takes longer has failed: its process ends and the others go on [s]."""

    def workload(self) -> Workload:
        """Shapes that calibration measures at."""
        rows, tokens = self.packed[-1]
        return Workload(
            slots=self.rollout.samples, kv_len=self.rollout.length, chunk_steps=self.chunk_steps,
            rows=rows, row_tokens=tokens, chunk_tokens=self.chunk_tokens, dtype=self.dtype,
            remat="block",
        )  # fmt: skip

    def cases(self) -> list[Case]:
        """All cases, in the order in which they are run: of every model first what the figures to reach ask
        for, then what is set beside it, so that a short time on a device tells most."""
        parts = (self._phases_of, self._rollout_and_peers_of, self._whole_steps_of, self._more_of)
        return [case for part in parts for model in self.models for case in part(model)]

    def _phases_of(self, model: str) -> list[Case]:
        rows, tokens = self.packed[-1]
        cases = [Case(kind="calibrate", model=model)]
        cases += [Case(kind="decode", model=model, rows=b, tokens=s) for b, s in self.decode_first]
        cases += [
            Case(kind="train", model=model, rows=rows, tokens=tokens, remat=remat)
            for remat in ("block", "none")
        ]
        cases += [Case(kind="optimizer", model=model), Case(kind="publish", model=model)]
        cases += [Case(kind="prefill", model=model, rows=b, tokens=t) for b, t in self.prefill]
        return [*cases, Case(kind="score", model=model, rows=rows, tokens=tokens)]

    def _rollout_and_peers_of(self, model: str) -> list[Case]:
        rows, tokens = self.packed[-1]
        cases = [
            Case(kind="decode", model=model, rows=b, tokens=s, attention=program)
            for b, s in self.decode_first
            for program in self.decode_programs
        ]
        cases.append(Case(kind="rollout", model=model))
        peers: list[tuple[Peer, Remat]] = [("train", "none"), ("train", "block")]
        cases += [Case(kind="peers", model=model, peer="generate")]
        if self.compiled_peers:
            peers.append(("train-compiled", "none"))
        return cases + [
            Case(kind="peers", model=model, peer=peer, rows=rows, tokens=tokens, remat=remat)
            for peer, remat in peers
        ]

    def _whole_steps_of(self, model: str) -> list[Case]:
        return [Case(kind="grpo", model=model, max_staleness=n) for n in (0, 1)]

    def _more_of(self, model: str) -> list[Case]:
        cases = [Case(kind="decode", model=model, rows=b, tokens=s) for b, s in self.decode]
        cases += self._decode_variants_of(model)
        (rows, tokens), packed = self.packed[-1], self.packed[:-1]
        cases += [
            Case(kind="train", model=model, rows=b, tokens=t, remat=remat)
            for b, t in packed
            for remat in ("block", "none")
        ]
        cases += [
            Case(kind="train", model=model, rows=rows, tokens=tokens, remat="block", attention=name)
            for name in self.row_programs
        ]
        cases += [Case(kind="score", model=model, rows=b, tokens=t) for b, t in packed]
        forward: list[tuple[Kind, int, int]] = [("prefill", b, t) for b, t in self.prefill]
        forward.append(("score", rows, tokens))
        cases += [
            Case(kind=kind, model=model, rows=b, tokens=t, attention=name)
            for kind, b, t in forward
            for name in self.row_programs
        ]
        if self.compiled_peers:
            cases.append(Case(kind="peers", model=model, peer="generate-static"))
        return cases

    def _decode_variants_of(self, model: str) -> list[Case]:
        def decode(shape: tuple[int, int], **more: Any) -> Case:
            return Case(kind="decode", model=model, rows=shape[0], tokens=shape[1], **more)

        cases = [decode(self.decode_first[0], shares=True)]
        if model == next(iter(self.models)):
            long = self.decode_long
            cases += [decode(long, attention=name) for name in self.decode_programs]
            cases += [decode(long, shares=True)]
            cases += [decode(long, cache_dtype=name) for name in self.cache_dtypes]
        return cases


def _qwen3(width: int, ffw_size: int) -> ModelConfig:
    """Qwen3 with 28 layers, as its config.json says (Hugging Face Qwen/Qwen3-0.6B and -1.7B)."""
    return ModelConfig(
        family="qwen3", vocab_size=151_936, width=width, num_layers=28, num_heads=16,
        num_kv_heads=8, head_size=128, ffw_size=ffw_size, max_positions=40_960, rope_theta=1e6,
        norm_eps=1e-6, qk_norm=True, tied_embeddings=True,
    )  # fmt: skip


GPU = Scale(
    name="gpu",
    models={"qwen3-0.6b": _qwen3(1024, 3072), "qwen3-1.7b": _qwen3(2048, 6144)},
    dtype="bfloat16",
    decode_first=((256, 512), (1, 512)),
    decode=((1, 2048), (64, 512), (64, 2048), (512, 512), (256, 2048), (512, 2048)),
    decode_programs=("pallas", "cudnn"),
    decode_long=(256, 2048),
    cache_dtypes=("int8", "float8_e4m3"),
    row_programs=("xla", "pallas"),
    chunk_steps=32,
    prefill=((32, 512), (8, 2048)),
    packed=((2, 2048), (8, 2048)),
    sequence=512,
    chunk_tokens=4096,
    rollout=Rollout(prompts=32, group=8, prompt_tokens=256, new_tokens=256),
    seconds=3.0,
    calibration_s=60.0,
    compiled_peers=True,
    first_s=60.0,
    longest_s=300.0,
)  # fmt: skip
TINY = Scale(
    name="tiny",
    models={
        "tiny": ModelConfig(
            family="qwen3", vocab_size=64, width=32, num_layers=1, num_heads=4, num_kv_heads=2,
            head_size=8, ffw_size=64, max_positions=64, norm_eps=1e-6, qk_norm=True,
        ),
    },
    dtype="float32",
    decode_first=((2, 32),),
    decode=((4, 32),),
    decode_programs=("xla",),
    decode_long=(4, 32),
    cache_dtypes=("int8", "float8_e4m3"),
    row_programs=(),  # the kernels need a GPU
    chunk_steps=4,
    prefill=((2, 16),),
    packed=((1, 32), (2, 32)),
    sequence=16,
    chunk_tokens=32,
    rollout=Rollout(prompts=2, group=2, prompt_tokens=20, new_tokens=12),
    seconds=0.05,
    calibration_s=2.0,
    compiled_peers=False,
    first_s=0.0,
    longest_s=200.0,
)  # fmt: skip
"""Every program of the suite on a CPU in seconds: shows that it works, not how fast. Shapes agree between
phases and whole steps, so that most programs compile once."""
