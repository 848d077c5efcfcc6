"""Command line and YAML, read by one parser, so that both give the same errors. Loads no jax.

    python -m jaxrl.train --config quickstart --algorithm dapo --grpo.clip-high=0.28 --train.steps 200

A YAML file is flattened into the same `--section.key=value` words that the command line uses. An algorithm
file replaces what the configuration says under grpo, except the batch; what stands on the command line wins.
Entry points run inside `user_errors`, which turns what a user can
mend into one message on stderr and exit code 2.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast

import tyro
import yaml

from jaxrl.config import Config, GrpoConfig
from jaxrl.errors import UserError, user_message

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it

AUTO, _AUTO_MESH = "auto", "--mesh.auto=True"
_NOISY_LOGS = ("absl", "asyncio")  # orbax and its tasks: pages for one full disk

_BOOLEANS = {"true": "True", "false": "False"}
_PACKAGE = Path(__file__).resolve().parent
CONFIG_FOLDERS = (_PACKAGE.parent / "configs", _PACKAGE / "configs")
"""Where a name is looked up after the literal path: the checkout, then the installed package."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedArgs:
    """What the command line asked for."""

    config: Config
    dry_run: bool
    """Print the plan and stop before anything is compiled or written."""
    debug: bool
    """Show tracebacks of user errors too."""
    list_algorithms: bool
    """Print the algorithms of configs/algorithms and stop."""
    recalibrate: bool = False
    """Measure the machine even if a stored calibration fits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Words:
    """The command line as tyro sees it: its own words, then the configuration without a prefix."""

    config: str | None = None
    """YAML file, or a name from configs/ such as quickstart. Options below override it."""
    algorithm: str | None = None
    """YAML file, or a name from configs/algorithms/ such as dapo. Sets all of grpo but prompts_per_step and
    group_size."""
    list_algorithms: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the algorithms with their choices and sources, then stop."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print sizes, memory and predicted times, then stop before the first step."""
    recalibrate: tyro.conf.FlagCreatePairsOff[bool] = False
    """Measure this machine again instead of using the stored calibration (roofline.calibrate)."""
    debug: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show the traceback of an error as well as its message."""
    settings: Annotated[tyro.conf.FlagConversionOff[Config], tyro.conf.arg(name="")] = field(
        default_factory=Config
    )


def parse_args(
    argv: Sequence[str],
    *,
    prog: str = "python -m jaxrl.train",
    description: str = "Train a language model with reinforcement learning.",
) -> ParsedArgs:
    """Configuration from `--config` and `--algorithm` (files) overridden by the other words of `argv`.

    `--grpo.clip-high=0.28` and `--grpo.clip_high 0.28` mean the same.

    Raises:
        UserError: the file is missing, is not valid YAML, or holds an invalid key or value.
        SystemExit: code 2 after a message for a bad word in `argv`; code 0 after `--help`.
    """
    argv = _with_auto_mesh(argv)
    name, algorithm = _file_word(argv, "--config"), _file_word(argv, "--algorithm")
    base = Config() if name is None else load_config(resolve_config(name))
    of_file: list[str] = []
    if algorithm is not None:
        path = resolve_config(algorithm, "--algorithm")
        load_algorithm(path, Config())  # what is wrong in the file itself is said of the file
        of_file = [*_flatten(_algorithm(path, base)[0])]
        base = dataclasses.replace(base, grpo=GrpoConfig())
    words = tyro.cli(
        _Words,
        args=[
            *of_file,
            *map(_spelled, argv),
        ],  # in one go: the command line may mend a contradiction
        default=_Words(config=name, algorithm=algorithm, settings=base),
        prog=prog,
        description=description,
    )
    return ParsedArgs(
        config=words.settings, dry_run=words.dry_run, debug=words.debug,
        list_algorithms=words.list_algorithms, recalibrate=words.recalibrate,
    )  # fmt: skip


def _with_auto_mesh(argv: Sequence[str]) -> list[str]:
    """`argv` with `--mesh auto` as the setting that it means."""
    words = list(argv)
    while "--mesh" in words:
        at = words.index("--mesh")
        words[at : at + 2] = [f"--mesh={''.join(words[at + 1 : at + 2])}"]
    for word in words:
        if word.startswith("--mesh=") and word != f"--mesh={AUTO}":
            raise UserError(
                f"{word}: auto is the only word; a size is set by --mesh.learner-fsdp=2"
            )
    return [_AUTO_MESH if word == f"--mesh={AUTO}" else word for word in words]


def _file_word(argv: Sequence[str], option: str) -> str | None:
    """Value of `option` in `argv`; tyro reports a missing value, so that case is None here."""
    found = [word.partition("=")[2] for word in argv if word.startswith(f"{option}=")]
    found += [
        value
        for word, value in itertools.pairwise(argv)
        if word == option and not value.startswith("--")
    ]
    if len(found) > 1:
        raise UserError(
            f"{option} is given {len(found)} times ({', '.join(found)}); name one file and "
            "override single values with --section.key=value"
        )
    return found[0] if found else None


def resolve_config(name: str, option: str = "--config") -> Path:
    """File that `name` means: the literal path, then `name[.yaml]` in each of CONFIG_FOLDERS.

    For the option --algorithm their folder algorithms/ is searched.
    """
    literal = Path(name)
    if literal.is_file():
        return literal
    folders = [f if option == "--config" else f / "algorithms" for f in CONFIG_FOLDERS]
    inner = Path(*literal.parts[1:]) if literal.parts[:1] == ("configs",) else literal
    inner = Path(inner.name) if inner.parts[:1] == ("algorithms",) else inner
    for folder in folders:
        for candidate in (folder / inner, folder / f"{inner}.yaml"):
            if candidate.is_file():
                return candidate
    if literal.is_dir():
        raise UserError(
            f"{option} {name} is a folder; give a YAML file, "
            f"for a run folder {literal / 'config.yaml'}"
        )
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    near = difflib.get_close_matches(inner.stem, known, n=1)
    raise UserError(
        f"{option} {name}: no such file, and no configuration of that name"
        + (f"; did you mean {near[0]}?" if near else "")
        + f" (known names: {', '.join(known) or 'none'})"
    )


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error; PyYAML would keep the last silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Mapping of the node; raises on a repeated key."""
        keys = [key.value for key, _ in node.value]
        for position, (key, _) in enumerate(node.value):
            if key.value in keys[:position]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
        return super().construct_mapping(node, deep)


def load_config(path: Path) -> Config:
    """Configuration in the YAML file `path`; fields it does not name keep their defaults.

    Raises:
        UserError: the file cannot be read, is not a YAML mapping, or a key or value is not valid.
    """
    return config_of_tree(_read(path), path, Config())


@dataclass(frozen=True, kw_only=True, slots=True)
class About:
    """Where an algorithm comes from."""

    source: str
    departures: str
    """From the source; "-" where there is none."""


def load_algorithm(path: Path, base: Config) -> tuple[Config, About]:
    """`base` with the algorithm of the YAML file `path` in place of its grpo, except the batch.

    The file has a section `about` with source and departures beside the sections of a configuration.

    Raises:
        UserError: as `load_config`; `about` is missing or incomplete.
    """
    tree, about = _algorithm(path, base)
    return config_of_tree(tree, path, dataclasses.replace(base, grpo=GrpoConfig())), about


def _algorithm(path: Path, base: Config) -> tuple[Mapping[Any, Any], About]:
    """The sections of the algorithm's file, with the batch of `base`."""
    tree = dict(_read(path))
    about = tree.pop("about", None)
    keys = {item.name for item in dataclasses.fields(About)}
    if not isinstance(about, Mapping) or set(about) != keys:
        raise UserError(
            f"{path} is no algorithm: it needs a section 'about' with exactly {', '.join(sorted(keys))}"
        )
    batch = {"prompts_per_step": base.grpo.prompts_per_step, "group_size": base.grpo.group_size}
    tree["grpo"] = {**batch, **(tree.get("grpo") or {})}
    return tree, About(source=str(about["source"]), departures=str(about["departures"]))


def _read(path: Path) -> Mapping[Any, Any]:
    """The mapping in the YAML file `path`."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the configuration file {path}: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if tree is not None and not isinstance(tree, dict):
        raise UserError(
            f"{path} holds a {type(tree).__name__}; it must map sections to values, "
            "as in 'train: {steps: 100}'"
        )
    return tree or {}


def config_of_tree(tree: Mapping[Any, Any], path: Path, base: Config) -> Config:
    """`base` with the values of `tree`, which stands in the file `path`."""
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return tyro.cli(
                Config,
                args=list(_flatten(tree)),
                default=base,
                add_help=False,
                config=(tyro.conf.FlagConversionOff,),
            )
    except SystemExit as error:
        raise UserError(
            f"{path} is not a valid configuration.\n{message.getvalue().rstrip()}"
        ) from error


def _flatten(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    """Command-line words that say the same as the YAML mapping `tree`."""
    sections = {section.name for section in dataclasses.fields(Config)}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        elif key == "mesh" and not prefix and value == AUTO:
            yield _AUTO_MESH
        elif value is None and not prefix and key in sections:
            continue  # a section with nothing under it
        elif isinstance(value, list) and _holds_list(f"{prefix}{key}"):
            if value:
                yield from (_dashed(f"--{prefix}{key}"), *map(str, value))
        else:
            yield f"{_dashed(f'--{prefix}{key}')}={value}"


def _holds_list(key: str) -> bool:
    """Whether the field `section.name` of a configuration is a list of values."""
    section, _, name = key.partition(".")
    return isinstance(getattr(getattr(Config(), section, None), name, None), tuple)


def _dashed(option: str) -> str:
    """`option` with the dashes of the help, so that tyro finds what a misspelt one is near to."""
    return option.replace("_", "-")


def _spelled(word: str) -> str:
    """A word of the command line, `_dashed` and with YAML's true and false as Python's."""
    if not word.startswith("--"):
        return _BOOLEANS.get(word, word)
    key, equals, value = word.partition("=")
    return _dashed(key) + equals + _BOOLEANS.get(value, value)


def save_config(config: Config, path: Path) -> None:
    """Write `config` as YAML that `load_config` reads back to an equal one, in one atomic move."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(config_yaml(config), encoding="utf-8")
    partial.replace(path)


def config_yaml(config: Config) -> str:
    """The YAML text of `config`, every field written out, in the order of the dataclasses.

    Characters beyond ASCII are escaped: PyYAML would fold some, such as U+0085, into spaces.
    """
    return yaml.safe_dump(plain(dataclasses.asdict(config)), sort_keys=False)


def plain(value: object) -> object:
    """`value` with paths as text, so that YAML needs no tags."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    return str(value) if isinstance(value, Path) else value


def config_difference(first: Config, second: Config) -> dict[str, tuple[object, object]]:
    """Keys such as 'grpo.clip_high' whose values differ, with (value in first, value in second)."""
    pairs = zip(_leaves(first), _leaves(second), strict=True)
    return {key: (one, two) for (key, one), (_, two) in pairs if one != two}


def _leaves(node: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    for item in dataclasses.fields(cast("Any", node)):
        value = getattr(node, item.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value


@contextlib.contextmanager
def user_errors(debug: bool = False) -> Iterator[None]:
    """Inside it, an error that the user can mend ends the process with one message and exit code 2.

    Works as a context and as a decorator. With `debug` the traceback is printed before the message.
    Errors that only a programmer can mend pass through unchanged. Without `debug` the logs of libraries
    are silent: what matters in them comes as an exception too.
    """
    for name in _NOISY_LOGS:
        logging.getLogger(name).setLevel(logging.WARNING if debug else logging.CRITICAL)
    try:
        yield
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from the newest checkpoint.", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:  # the reader of stdout left, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)
        raise SystemExit(EXIT_USER_ERROR) from None
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        if debug:
            traceback.print_exc()
        print(f"Error: {message}", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR) from None
