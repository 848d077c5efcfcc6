"""The policy a configuration asks for: its shape, its tokenizer, its first weights."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrl.chat import ChatTokenizer, load_chat_template
from jaxrl.config import ModelOptions
from jaxrl.errors import UserError
from jaxrl.tasks import Task
from jaxrl.tokenizer import CharTokenizer, Tokenizer, load_tokenizer
from models.config import ModelConfig
from models.decoder import Decoder, Policy
from models.hf import checkpoint_folder, describe_model, load_policy, read_config
from models.hf.read import checked_tensors
from models.sharding import adapt, init_sharded, policy_shardings

_ADAPTER_STREAM = 1
"""Of the random streams below run.seed, the one that draws a fresh adapter."""
THINKING = {"default": None, "on": True, "off": False}
"""What a chat template is told for each model.thinking."""
_SHAPE = ("width", "num_layers", "num_heads", "num_kv_heads", "head_size", "ffw_size", "qk_norm")


def resolve_model(
    options: ModelOptions, task: Task, max_positions: int
) -> tuple[ModelConfig, Tokenizer]:
    """Architecture and tokenizer: from model.path, or from the model.* shape and the task's alphabet.

    Raises:
        UserError: the checkpoint cannot be found or used, does not reach `max_positions` tokens or has
            fewer token ids than its tokenizer, or model.path and a shape are both given.
    """
    if options.path is None:
        if options.chat:
            raise UserError(
                "model.chat=true needs a checkpoint with a chat template; set model.path"
            )
        return _from_scratch(options, task, max_positions)
    config, tokenizer, folder = read_checkpoint(options)
    if config.max_positions < max_positions:
        raise UserError(
            f"rollout.max_prompt_tokens + rollout.max_new_tokens = {max_positions}, but the checkpoint "
            f"{options.path} was made for {config.max_positions} positions; lower one of the two"
        )
    return config, _chatting(options, tokenizer, folder)


def read_checkpoint(options: ModelOptions) -> tuple[ModelConfig, Tokenizer, Path]:
    """Architecture, tokenizer and local folder of the checkpoint that model.path names.

    Raises:
        UserError: there is none, it cannot be used, it has fewer token ids than its tokenizer, or a
            shape is given too.
    """
    if options.path is None:
        raise UserError("model.path names no checkpoint; set it to a folder or a hub id")
    folder = model_folder(options.path)
    default = ModelOptions()
    given = [name for name in _SHAPE if getattr(options, name) != getattr(default, name)]
    if given:
        raise UserError(
            f"model.path={options.path} brings its own shape, but model.{given[0]}="
            f"{getattr(options, given[0])} is set too; remove model.{', model.'.join(given)}"
        )
    try:
        config = read_config(folder)
    except (ValueError, OSError) as error:
        raise UserError(f"model.path={options.path}: {error}") from error
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"model.path={options.path} has embeddings for {config.vocab_size} tokens, but its tokenizer "
            f"has {tokenizer.vocab_size}; these files belong to different checkpoints"
        )
    return config, tokenizer, folder


def _chatting(options: ModelOptions, tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    """The tokenizer, for chats if the configuration wants them."""
    if options.chat:
        template, thinking = load_chat_template(folder), THINKING[options.thinking]
        return ChatTokenizer(tokenizer, template, system=options.system, thinking=thinking)
    for name in ("system", "thinking"):
        if getattr(options, name) != getattr(ModelOptions(), name):
            raise UserError(f"model.{name} is set, but model.chat is false; set model.chat=true")
    return tokenizer


@cache
def model_folder(path: Path) -> Path:
    """The local folder of model.path: the folder itself, or what the hub id stands for.

    Raises: UserError if there is no such folder and nothing can be fetched.
    """
    try:
        return checkpoint_folder(path)
    except ValueError as error:
        raise UserError(f"model.path={error}") from error


def _from_scratch(
    options: ModelOptions, task: Task, max_positions: int
) -> tuple[ModelConfig, Tokenizer]:
    if task.alphabet is None:
        raise UserError(
            f"task.name={task.name} needs a trained checkpoint and its tokenizer; set model.path to its "
            "folder or hub id"
        )
    tokenizer = CharTokenizer(task.alphabet)
    try:
        config = ModelConfig(
            family="qwen3" if options.qk_norm else "llama",
            vocab_size=tokenizer.vocab_size,
            width=options.width,
            num_layers=options.num_layers,
            num_heads=options.num_heads,
            num_kv_heads=options.num_kv_heads,
            head_size=options.head_size,
            ffw_size=options.ffw_size,
            max_positions=max_positions,
            qk_norm=options.qk_norm,
            tied_embeddings=options.tied_embeddings,
            eos_token_ids=tokenizer.stop_ids,
        )
    except ValueError as error:
        raise UserError(f"model.* does not describe a decoder: {error}") from error
    return config, tokenizer


def check_weights(options: ModelOptions, config: ModelConfig) -> None:
    """Raise UserError if the checkpoint's weights do not fit `config`, from the headers of its files: at once,
    and not when everything else has been measured and made."""
    if options.path is None:
        return
    try:
        checked_tensors(model_folder(options.path), config)
    except (ValueError, OSError) as error:
        raise UserError(f"model.path={options.path}: {error}") from error


def first_policy(options: ModelOptions, config: ModelConfig, mesh: Mesh, seed: int) -> Decoder:
    """Weights on the learner mesh: the checkpoint's, or drawn from `seed`.

    Float32; the frozen base of an adapter in the compute dtype.
    """
    dtype = jnp.dtype("float32" if config.lora is None else options.dtype)
    if options.path is None:
        return init_sharded(config, jax.random.key(seed), mesh, dtype)
    try:
        return load_policy(
            model_folder(options.path),
            config,
            dtype=dtype,
            shardings=policy_shardings(config, mesh),
        )
    except (ValueError, OSError) as error:
        raise UserError(f"model.path={options.path}: {error}") from error


def with_adapter(base: Decoder, mesh: Mesh, seed: int) -> Policy:
    """`base`, or if its configuration says so, `base` frozen under a fresh adapter."""
    if base.config.lora is None:
        return base
    return adapt(base, jax.random.fold_in(jax.random.key(seed), _ADAPTER_STREAM), mesh)


def describe_policy(
    options: ModelOptions, config: ModelConfig, tokenizer: Tokenizer, run: Path
) -> None:
    """Write into the run folder what its weights mean, so that `python -m models.hf export` needs
    nothing else."""
    source = None if options.path is None else model_folder(options.path)
    folder = describe_model(config, run, source, None if source is None else str(options.path))
    if isinstance(tokenizer, CharTokenizer):
        tokenizer.save(folder)
