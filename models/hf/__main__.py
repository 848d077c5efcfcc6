"""`python -m models.hf inspect | export | merge | new`: checkpoints as files."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from models.families import FAMILIES
from models.hf.export import export_run
from models.hf.inspect import inspect
from models.hf.merge import merge
from models.hf.new import new_checkpoint, train_tokenizer
from models.hf.read import checkpoint_folder

DTYPES = ("float32", "bfloat16", "float16")
_SHAPE = {
    "width": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_size": 16, "ffw": 192,
    "positions": 1024, "vocab": 4096,
}  # fmt: skip
"""Whole numbers that `new` takes, with their defaults."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; a mistake of the user's ends in one message and exit code 2."""
    options = _parser().parse_args(argv)
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax misses a file that nothing here needs
    try:
        print(options.run_command(options))
    except (ValueError, OSError) as error:
        sys.exit(_fail(error))


def _fail(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m models.hf", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    look = commands.add_parser("inspect", help="family, parameters, memory, shardings")
    look.add_argument("path", help="folder of a checkpoint, or hub id")
    for axis in ("data", "fsdp", "tensor"):
        look.add_argument(f"--{axis}", type=_count, default=1, help=f"size of mesh axis {axis}")
    look.set_defaults(run_command=_inspect)
    out = commands.add_parser("export", help="a run's checkpoint as a Hugging Face folder")
    out.add_argument("--run", type=Path, required=True, dest="run_dir", help="run folder")
    out.add_argument("--step", type=int, help="which checkpoint; default: the newest")
    out.add_argument(
        "--adapter", action="store_true", help="the adapter alone, for peft; default: merged"
    )
    out.set_defaults(run_command=_export)
    mean = commands.add_parser("merge", help="weighted mean of checkpoints of one architecture")
    mean.add_argument("sources", nargs="+", help="folders of checkpoints, or hub ids")
    mean.add_argument(
        "--weights", type=float, nargs="+", help="one per source, summing to 1; default: equal"
    )
    mean.set_defaults(run_command=_merge)
    fresh = commands.add_parser("new", help="a checkpoint with random weights around a tokenizer")
    words = fresh.add_mutually_exclusive_group(required=True)
    words.add_argument("--tokenizer", type=Path, help="its folder, or tokenizer.json, also gzipped")
    words.add_argument(
        "--text", type=Path, help="learn a tokenizer of --vocab tokens from this file, also gzipped"
    )
    fresh.add_argument("--out", type=Path, required=True, help="folder to make")
    fresh.add_argument("--eos", help="token that ends a completion; default: the tokenizer's own")
    fresh.add_argument("--chat-template", type=Path, help="jinja file to go along")
    fresh.add_argument("--family", choices=sorted(FAMILIES), default="qwen3")
    for name, default in _SHAPE.items():
        fresh.add_argument(f"--{name.replace('_', '-')}", type=_count, default=default)
    fresh.add_argument("--seed", type=int, default=0)
    fresh.set_defaults(run_command=_new)
    for command in (out, mean):
        command.add_argument("--out", type=Path, required=True, help="folder to make")
        command.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
    return parser


def _count(word: str) -> int:
    """A whole number from 1 on; argparse makes its message and exit code 2 of the error."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} must be a whole number from 1 on")
    return int(word)


def _inspect(options: argparse.Namespace) -> str:
    folder = checkpoint_folder(options.path)
    return inspect(folder, data=options.data, fsdp=options.fsdp, tensor=options.tensor)


def _export(options: argparse.Namespace) -> str:
    step = export_run(
        options.run_dir, options.out, step=options.step, dtype=options.dtype,
        adapter=options.adapter,
    )  # fmt: skip
    if options.adapter:
        return f"adapter of checkpoint {step} of {options.run_dir} written to {options.out}"
    return f"checkpoint {step} of {options.run_dir} written to {options.out} in {options.dtype}"


def _merge(options: argparse.Namespace) -> str:
    sources = [checkpoint_folder(source) for source in options.sources]
    merge(sources, options.out, weights=options.weights, dtype=options.dtype)
    return f"mean of {len(sources)} checkpoints written to {options.out} in {options.dtype}"


def _new(options: argparse.Namespace) -> str:
    shape = {name: getattr(options, name) for name in _SHAPE if name != "vocab"}
    with tempfile.TemporaryDirectory() as folder:
        if options.text is not None:
            train_tokenizer(options.text, Path(folder), options.vocab)
        config = new_checkpoint(
            options.tokenizer or Path(folder), options.out, family=options.family, eos=options.eos,
            chat_template=options.chat_template, seed=options.seed, **shape,
        )  # fmt: skip
    return f"{config.num_parameters:,} random parameters written to {options.out}"


if __name__ == "__main__":
    main()
