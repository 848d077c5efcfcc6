"""The configuration tree: plain frozen dataclasses, each field with its meaning and unit.

`jaxrl.cli` fills it from a YAML file and the command line through one parser. Cross-field checks that need
nothing but the configuration live here; checks that need the model or the devices live in `jaxrl.plan`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jaxrl.algorithms.config import GrpoConfig
from jaxrl.consistency import check_consistency
from jaxrl.errors import UserError
from jaxrl.ranges import check_ranges
from jaxrl.sections import (
    CurriculumConfig,
    LoraConfig,
    PreferenceConfig,
    SftConfig,
    ShapingConfig,
)
from models.rows import PrefixRows, SharedPrompts


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)


TaskName = Literal["arithmetic", "countdown", "stories", "gsm8k", "math", "code", "jsonl"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Where the run lives and what makes it repeatable."""

    dir: Path = Path("runs/default")
    """Folder of the run: configuration, metrics, checkpoints, report. The same folder again resumes it."""
    seed: int = 0
    """Root of every random stream of the run."""
    fork_from: Path | None = None
    """Start from this run folder's newest checkpoint (weights only), as a new run at step 0."""
    report: bool = True
    """Write report.md and report.html at the end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """Which policy: a checkpoint folder, or a decoder initialised from scratch in the given shape."""

    path: Path | None = None
    """Checkpoint: folder with config.json and safetensors, or hub id; it brings the shape below."""
    chat: bool = False
    """Prompts are the user's turn in the checkpoint's own chat template; without, plain text."""
    system: str | None = None
    """chat: the system turn before it."""
    thinking: Literal["default", "on", "off"] = "default"
    """chat: mode of a hybrid model (Qwen3, SmolLM3); default: what its template does unasked."""
    width: int = 128
    """D, residual stream."""
    num_layers: int = 2
    """L."""
    num_heads: int = 4
    """N, query heads."""
    num_kv_heads: int = 2
    """K, key and value heads."""
    head_size: int = 32
    """H."""
    ffw_size: int = 384
    """F, inner size of the gated MLP."""
    qk_norm: bool = True
    """RMSNorm on each head of q and k."""
    tied_embeddings: bool = True
    """The head is the transposed embedding."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype; parameters and optimizer state on the learner are float32."""
    remat: Literal["none", "block"] = "none"
    """What backward recomputes: nothing, or each layer."""
    attention: Literal["auto", "blocks", "xla", "cudnn", "pallas"] = "auto"
    """Program of attention in training, scoring and prefill; auto: the fastest one measured on the device, else
    cudnn where it accepts the rows, xla on other GPUs, blocks on a CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig:
    """What the policy learns to do."""

    name: TaskName = "arithmetic"
    """arithmetic: sums; countdown: reach a target; stories: story openings; gsm8k, math, code: those data
    sets or files in their form; jsonl: any file of prompts and answers."""
    digits: int = 2
    """arithmetic: digits of each operand."""
    operators: str = "+"
    """arithmetic: operators drawn from, a subset of '+-*'."""
    worked: bool = False
    """arithmetic: the worked solution goes column by column instead of giving the answer at once."""
    numbers: int = 3
    """countdown: how many numbers are given."""
    path: Path | None = None
    """gsm8k, math, code, jsonl: file of problems (.jsonl, .jsonl.gz, .parquet), or a data set of the hub as
    owner/name:split or owner/name:subset:split. A problem's hash decides its split: 80/10/10."""
    test_path: Path | None = None
    """The whole test split, in the same forms; what it holds is left out of path, which then splits 90/10."""
    prompt_template: str | None = None
    """Prompt with {problem} in it; None: the task's own, for chat models. A base model may want
    'Question: {problem}\\nAnswer:'."""
    max_chars: int = 0
    """Leave out problems whose prompt or worked solution is longer [characters]; 0: none."""
    verifier: str | None = None
    """exact, math, code, similarity, or your own function (my_rewards.py:score, package.module:score); None:
    the task's own, for jsonl exact."""
    code_wall_s: float = 10.0
    """code: longest run of a program on one test [s]."""
    code_adaptive: bool = False
    """code: lower that limit, test by test, to what correct programs need."""
    num_train: int = 8192
    """Most problems in the train split (a task may have fewer)."""
    num_eval: int = 256
    """Most problems in the validation split, and as many again in the test split."""
    shaping: ShapingConfig = field(default_factory=ShapingConfig)
    """From the verdict to the reward."""
    reward_workers: int = 1
    """Verifier processes; 0 verifies in the rollout thread."""
    reward_timeout_s: float = 15.0
    """Longest a single verification may take [s]; past it the reward is 0 and the case is counted."""
    reward_memory_gib: float = 8.0
    """Most memory that your own verifier may allocate in its process [GiB]; past it Python raises MemoryError,
    an error like any other. math and code have limits of their own."""
    reward_latency_s: float = 0.0
    """Added to each verification [s]: stands in for a slow verifier in experiments."""

    @property
    def judge(self) -> str | None:
        """Name of the verifier that judges; None: the task itself does."""
        own = {"gsm8k": "math", "math": "math", "code": "code", "jsonl": "exact"}
        return self.verifier or own.get(self.name)

    def __post_init__(self) -> None:
        _check(
            self.code_wall_s > 0, f"task.code_wall_s={self.code_wall_s} must be positive; usual: 10"
        )
        _check(
            self.judge != "code" or self.reward_timeout_s > self.code_wall_s,
            f"task.reward_timeout_s={self.reward_timeout_s} would end a verification before its program "
            f"reaches task.code_wall_s={self.code_wall_s}; set the first to {self.code_wall_s + 5} or more "
            "(jaxrl.score: --timeout-s), or lower the second",
        )
        _check(
            self.prompt_template is None or "{problem}" in self.prompt_template,
            f"task.prompt_template={self.prompt_template!r} lacks {{problem}}, where the problem goes; "
            "add it",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The optimizer and the length of the run."""

    steps: int = 100
    """Optimizer steps of reinforcement learning."""
    max_generated_tokens: int = 0
    """End with the step at which the run has generated so many completion tokens, those of discarded
    groups, votes and probes among them; 0: no such limit."""
    learning_rate: float = 1e-6
    """Peak AdamW learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warm-up; linear and cosine end at 10 % of the peak."""
    warmup_steps: int = 10
    """Linear warm-up from 0 [steps]."""
    beta1: float = 0.9
    """Adam's decay of the mean."""
    beta2: float = 0.95
    """Adam's decay of the square."""
    eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only (not norms, biases, embeddings)."""
    max_grad_norm: float = 1.0
    """Gradient norm at which the gradient is scaled down; 0 switches clipping off."""
    row_tokens: int = 64
    """T, length of a packed row [tokens]; no sequence may be longer."""
    shared_prompt_tokens: int = 0
    """Positions at the start of a row for prompts, each of which the samples behind it share, exactly and with
    fewer tokens to compute; at least rollout.max_prompt_tokens - 1. 0: each sample brings its own prompt."""
    row_parts: int = 1
    """With shared prompts: equal parts of the rest of a row, which attend to the prompts and themselves."""
    rows_per_microbatch: int = 64
    """Packed rows in one forward and backward; the token budget is rows_per_microbatch * row_tokens."""
    logprob_chunk_tokens: int = 4096
    """Tokens whose logits exist at once, so that memory does not grow with tokens * vocabulary."""
    max_nonfinite_steps: int = 3
    """Stop after this many steps in a row with a non-finite gradient; each one is skipped and counted."""

    @property
    def shared_prompts(self) -> SharedPrompts | None:
        """How rows are divided; None: samples bring their own prompts."""
        if not self.shared_prompt_tokens:
            return None
        return SharedPrompts(prompt_tokens=self.shared_prompt_tokens, parts=self.row_parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    """The sampling engine."""

    slots: int = 128
    """Sequences decoded at once."""
    chunk_steps: int = 8
    """Most decode steps per jitted call; slots are refilled and weights swapped between calls."""
    refill_cost_steps: float = 0.5
    """What ending a call early costs [decode steps]: it ends once idle slots wasted as much and work waits."""
    max_prompt_tokens: int = 32
    """Longest prompt [tokens]."""
    max_new_tokens: int = 32
    """Longest completion [tokens], the stop token included."""
    temperature: float = 1.0
    """Divides the logits, in the sampler and in the learner; 0 is greedy (evaluation only)."""
    top_p: float = 1.0
    """Nucleus mass to sample from; 1 is off."""
    top_k: int = 0
    """Most likely tokens to sample from; 0 is off."""
    max_staleness: int = 1
    """Most optimizer steps between the oldest token of a sample and the weights it trains; 0 is synchronous."""
    kv_on_swap: Literal["keep", "recompute"] = "keep"
    """What happens to cached keys and values of unfinished samples when the weights change."""
    shared_prefix: int = 0
    """Prompts whose keys and values are held once for all slots that sample them, exactly; a prompt waits while
    all are read. Usual: 2 * slots / group_size. 0: each slot holds a copy."""
    attention: Literal["auto", "blocks", "xla", "cudnn", "pallas"] = "auto"
    """Program of attention in decoding; blocks: products over key blocks, for a CPU; auto: as in model."""
    cache_dtype: Literal["auto", "bfloat16", "float32", "int8", "float8_e4m3"] = "auto"
    """Type of cached keys and values; auto: model.dtype. 8 bits stand beside a scale per head and token."""
    narrow_tail: bool = True
    """Decode the last samples, when nothing can enter, on a quarter or a sixteenth of the slots where the copy
    pays; the samples are the same. Each width compiles programs of its own: false for a short trial."""

    def prefixes(self, group: int) -> PrefixRows | None:
        """The shared prompts, each for up to `group` slots; None: there are none."""
        if not self.shared_prefix:
            return None
        return PrefixRows(rows=self.shared_prefix, lanes=group, tokens=self.max_prompt_tokens)

    def stored_dtype(self, compute: str) -> str:
        """Type of cached keys and values where the model computes in `compute`."""
        return compute if self.cache_dtype == "auto" else self.cache_dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class MeshConfig:
    """Which devices do what. Learner axes: data, fsdp, tensor. Rollout axes: data, tensor."""

    auto: bool = False
    """Also `--mesh auto` or `mesh: auto`: roofline.plan chooses the sizes below for the devices there are, and
    rollout.slots and train.rows_per_microbatch with them."""
    colocated: bool = False
    """Rollout and learner share the learner's devices instead of owning disjoint ones."""
    learner_data: int = 1
    """Learner: replicas of the parameters."""
    learner_fsdp: int = 1
    """Learner: devices the parameters and optimizer state are sharded over."""
    learner_tensor: int = 1
    """Learner: tensor parallel devices."""
    rollout_data: int = 1
    """Rollout: replicas; the slots are split over them."""
    rollout_tensor: int = 1
    """Rollout: tensor parallel devices."""

    @property
    def learner_devices(self) -> int:
        """Devices of the learner mesh."""
        return self.learner_data * self.learner_fsdp * self.learner_tensor

    @property
    def rollout_devices(self) -> int:
        """Devices of the rollout mesh."""
        return self.rollout_data * self.rollout_tensor

    @property
    def devices(self) -> int:
        """Devices of both meshes together."""
        return (
            max(self.learner_devices, self.rollout_devices)
            if self.colocated
            else (self.learner_devices + self.rollout_devices)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Held-out evaluation during the run."""

    every_steps: int = 20
    """Optimizer steps between evaluations of the validation split; 0: only before and after."""
    problems: int = 128
    """Problems of each periodic evaluation."""
    samples: int = 1
    """Samples per problem of each periodic evaluation."""
    final_samples: int = 8
    """Samples per problem before and after the run, on the test split: the k of pass@k."""
    temperature: float = 1.0
    """Sampling temperature of every evaluation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """What survives the process."""

    every_steps: int = 50
    """Optimizer steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """Newest checkpoints kept."""
    export_every_steps: int = 0
    """Optimizer steps between exports as Hugging Face folders, exports/step_N of the run; 0: none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Everything that makes a run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelOptions = field(default_factory=ModelOptions)
    task: TaskConfig = field(default_factory=TaskConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        check_ranges(self)
        check_consistency(self)
