"""What README says: its commands exist, its files exist, its figures are the committed ones."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = sorted(set(re.findall(r"python -m ((?:jaxrl|roofline|models|benchmarks)[\w.]*)", README)))
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


ALL_HELPS = """
import contextlib, io, json, runpy, sys
seen = {}
for module in sys.argv[1:]:
    text, code = io.StringIO(), None
    sys.argv = [module, "--help"]
    with contextlib.redirect_stdout(text):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            code = ended.code or 0
    seen[module] = code, text.getvalue()
print(json.dumps(seen))
"""


def answer_of(script: str, *words: str) -> Any:
    """What a program started in the checkout prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def helps() -> dict[str, tuple[int, str]]:
    """Exit code and output of `python -m MODULE --help`, from one process: most of the time is imports."""
    return answer_of(ALL_HELPS, *MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_every_command_prints_its_help(module: str, helps: dict[str, tuple[int, str]]) -> None:
    code, text = helps[module]
    assert code == 0
    assert "usage" in text.lower()


def test_every_training_command_parses() -> None:
    from jaxrl.cli import parse_args  # noqa: PLC0415

    commands = re.findall(
        r"^python -m jaxrl\.(?:train|sft) (.*?)(?:  +#.*)?$", README, re.MULTILINE
    )
    assert len(commands) >= 4
    for words in commands:
        assert parse_args(words.split()).config.train.steps > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_parses_and_is_named(name: str) -> None:
    from jaxrl.cli import parse_args  # noqa: PLC0415

    parse_args(["--config", name])
    assert name in README


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w[\w-]*)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_reading_order_names_files_that_exist() -> None:
    order = README.split("Reading order:")[1].split("\n\n")[0]
    files = re.findall(r"`([\w/]+\.py)`", order)
    assert len(files) >= 8
    for file in files:
        assert (ROOT / file).is_file(), file


@pytest.fixture(scope="module")
def tables() -> dict[str, str]:
    """What the committed results put into README, made in a process that finds `benchmarks` in the checkout."""
    script = (
        "import json; from benchmarks import peers_table as p, quickstart as q, record as r; "
        "c = json.loads((r.RESULTS / 'quickstart.json').read_text(encoding='utf-8')); "
        "print(json.dumps({'quickstart': q.START + q.block(c) + q.END, "
        "'peers': p.START + p.block(p.results()) + p.END}))"
    )
    return answer_of(script)


@pytest.mark.parametrize("name", ["quickstart", "peers"])
def test_a_table_of_figures_holds_the_committed_ones(name: str, tables: dict[str, str]) -> None:
    assert tables[name] in README
