"""The command line and YAML files through one parser; what a user sees when something is wrong."""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxrl import cli
from jaxrl.config import Config
from jaxrl.errors import UserError
from models.config import ModelConfig

MAX_HELP_S = 1.5  # a command that answers later than this feels broken
COLUMNS = 100


@pytest.fixture
def config_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "some.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def _rejected(argv, capsys) -> str:
    """What stands on stderr after `argv` is refused with exit code 2."""
    with pytest.raises(SystemExit) as stopped, cli.user_errors():
        cli.parse_args(argv)
    assert stopped.value.code == cli.EXIT_USER_ERROR
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    assert out == ""
    return " ".join(err.replace("│", " ").split())


@pytest.mark.parametrize(
    "words",
    [
        ["--grpo.clip-high=0.28"],
        ["--grpo.clip_high", "0.28"],
        ["--grpo.clip_high=0.28"],
        ["--grpo.clip-high", "0.28"],
    ],
)
def test_both_spellings_of_an_override_mean_the_same(words):
    assert cli.parse_args(words).config.grpo.clip_high == 0.28


@pytest.mark.parametrize("words", [["--run.report=false"], ["--run.report", "False"]])
def test_false_may_be_written_as_in_yaml_or_in_python(words):
    assert cli.parse_args(words).config.run.report is False


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(config_file):
    path = config_file("train:\n  steps: 7\n  learning_rate: 1e-4\ngrpo:\n  clip_low: 0.1\n")
    config = cli.parse_args(["--config", path, "--train.steps=9"]).config
    assert (config.train.steps, config.train.learning_rate) == (9, 1e-4)
    assert (config.grpo.clip_low, config.grpo.clip_high) == (0.1, Config().grpo.clip_high)


def test_switches_and_paths_reach_the_result():
    parsed = cli.parse_args(["--dry-run", "--debug", "--run.fork-from", "runs/a"])
    assert (parsed.dry_run, parsed.debug) == (True, True)
    assert parsed.config.run.fork_from == Path("runs/a")
    assert not cli.parse_args([]).dry_run


@pytest.mark.parametrize(
    "word", ["--task.operators=-", "--task.operators=--", "--task.operators=a=b"]
)
def test_a_value_may_hold_dashes_and_equal_signs(word):
    assert cli.parse_args([word]).config.task.operators == word.partition("=")[2]


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("--grpo.clip-hihg=0.3", "--grpo.clip-high FLOAT"),
        ("--grpo.clip_hihg=0.3", "--grpo.clip-high FLOAT"),
        ("--dry-rnu", "--dry-run"),
        ("--trian.steps=3", "--train.steps INT"),
    ],
)
def test_a_misspelt_option_names_its_neighbour(word, near, capsys):
    message = _rejected([word], capsys)
    assert "Unrecognized options" in message
    assert near in message


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--grpo.clip-high=abc", "could not convert string to float: 'abc'"),
        ("--train.steps=1.5", "--train.steps"),
        (
            "--grpo.ratio=foo",
            "Expected one of ('ppo', 'cispo', 'reinforce', 'gspo', 'gspo_token', 'sapo', 'dppo')",
        ),
        ("--task.worked=yes", "Expected one of ('True', 'False')"),
        ("--grpo.group-size=1", "a group needs at least 2 samples"),
        ("--train.row-tokens=3", "set train.row_tokens to at least 64"),
    ],
)
def test_a_bad_value_names_option_and_what_is_allowed(word, said, capsys):
    assert said in _rejected([word], capsys)


@pytest.mark.parametrize(
    ("yaml_text", "said"),
    [
        ("grpo:\n  clip_hihg: 0.3\n", "Perhaps you meant: --grpo.clip-high FLOAT"),
        ("grpo:\n  clip_high: abc\n", "could not convert string to float: 'abc'"),
        ("trian:\n  steps: 3\n", "Perhaps you meant: --train.steps INT"),
        ("train:\n  steps: 1.5\n", "invalid literal for int()"),
        ("train:\n  steps: [1, 2]\n", "invalid literal for int()"),
        ("grpo: 5\n", "--grpo=5"),
        ("train:\n  row_tokens: 3\n", "set train.row_tokens to at least 64"),
        ("train:\n  steps: 1\n  steps: 2\n", "'steps' is given twice"),
        ("train: [\n", "not valid YAML"),
        ("- 1\n", "must map sections to values"),
    ],
)
def test_a_bad_file_is_named_with_the_same_message_as_the_command_line(
    yaml_text, said, config_file, capsys
):
    path = config_file(yaml_text)
    message = _rejected(["--config", path], capsys)
    assert path in message
    assert said in message


def test_an_empty_file_and_an_empty_section_are_the_defaults(config_file):
    assert cli.load_config(Path(config_file(""))) == Config()
    assert cli.load_config(Path(config_file("grpo:\ntrain:\n"))) == Config()


@pytest.mark.parametrize("name", ["small", "small.yaml", "configs/small.yaml", "configs/small"])
def test_a_configuration_is_found_by_name_from_any_folder(name, tmp_path, monkeypatch):
    shipped = tmp_path / "package" / "configs"
    shipped.mkdir(parents=True)
    (shipped / "small.yaml").write_text("train: {steps: 3}\n")
    monkeypatch.setattr(cli, "CONFIG_FOLDERS", (tmp_path / "absent", shipped))
    monkeypatch.chdir(tmp_path)
    assert cli.parse_args(["--config", name]).config.train.steps == 3


def test_a_literal_path_wins_over_a_name(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "small.yaml").write_text("train: {steps: 3}\n")
    (tmp_path / "small.yaml").write_text("train: {steps: 4}\n")
    monkeypatch.setattr(cli, "CONFIG_FOLDERS", (tmp_path / "configs",))
    monkeypatch.chdir(tmp_path)
    assert cli.load_config(cli.resolve_config("small.yaml")).train.steps == 4
    assert cli.load_config(cli.resolve_config("small")).train.steps == 3


def test_an_unknown_configuration_lists_the_known_ones(tmp_path, monkeypatch, capsys):
    (tmp_path / "quickstart.yaml").write_text("")
    monkeypatch.setattr(cli, "CONFIG_FOLDERS", (tmp_path,))
    message = _rejected(["--config", "quikstart"], capsys)
    assert "did you mean quickstart?" in message
    assert "a folder" in _rejected([f"--config={tmp_path}"], capsys)


def test_a_missing_or_repeated_config_is_refused(config_file, capsys):
    path = config_file("")
    assert "Missing value" in _rejected(["--config"], capsys)
    assert "given 2 times" in _rejected(["--config", path, f"--config={path}"], capsys)


def test_help_fits_the_terminal_and_explains_every_field(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    with pytest.raises(SystemExit) as stopped:
        cli.parse_args(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= COLUMNS
    for section in dataclasses.fields(Config):
        for item in dataclasses.fields(section.default_factory()):
            assert f"--{section.name}.{item.name}".replace("_", "-") in text


def test_help_comes_at_once_and_without_jax():
    program = (
        "import sys\nfrom jaxrl.cli import parse_args\n"
        "try: parse_args(['--help'])\nfinally: assert 'jax' not in sys.modules"
    )
    command = [sys.executable, "-c", program]

    def seconds() -> float:
        begin = time.perf_counter()
        subprocess.run(
            command, cwd=cli.CONFIG_FOLDERS[0].parent, capture_output=True, check=True, timeout=60
        )
        return time.perf_counter() - begin

    assert min(seconds() for _ in range(3)) < MAX_HELP_S


def _raise(error: BaseException, cause: BaseException | None = None) -> None:
    raise error from cause


def _bad_model() -> ModelConfig:
    return ModelConfig(
        vocab_size=8, width=8, num_layers=1, num_heads=3, num_kv_heads=2, head_size=4, ffw_size=8
    )


@pytest.mark.parametrize(
    ("action", "said"),
    [
        (lambda: _raise(UserError("the remedy")), "Error: the remedy"),
        (_bad_model, "num_heads=3 is not a multiple of num_kv_heads=2"),
        (lambda: _raise(PermissionError(13, "Permission denied", "/there/x")), "/there/x"),
        (lambda: _raise(OSError(28, "No space left on device", "/there/x")), "disk is full"),
        (lambda: _raise(MemoryError()), "--train.rows-per-microbatch"),
        (
            lambda: _raise(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")),
            "out of memory: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes",
        ),
        (
            lambda: _raise(RuntimeError("a worker failed"), UserError("bad line in the file")),
            "bad line in the file",
        ),
    ],
)
def test_what_a_user_can_mend_is_one_message_and_exit_code_2(action, said, capsys):
    with pytest.raises(SystemExit) as stopped, cli.user_errors():
        action()
    assert stopped.value.code == cli.EXIT_USER_ERROR
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err


def test_debug_adds_the_traceback(capsys):
    with pytest.raises(SystemExit), cli.user_errors(debug=True):
        raise UserError("the remedy")
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("Error: the remedy\n")


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(ValueError, match="not ours"), cli.user_errors():
        raise ValueError("not ours")


def test_an_interrupt_ends_with_the_code_of_shells(capsys):
    with pytest.raises(SystemExit) as stopped, cli.user_errors():
        raise KeyboardInterrupt
    assert stopped.value.code == cli.EXIT_INTERRUPTED
    assert "Traceback" not in capsys.readouterr().err


def test_user_errors_decorates_an_entry_point(capsys):
    @cli.user_errors()
    def main() -> None:
        raise UserError("the remedy")

    for _ in range(2):
        with pytest.raises(SystemExit):
            main()
    assert capsys.readouterr().err == "Error: the remedy\n" * 2
