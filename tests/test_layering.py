"""The packages stand in one order, and what must load quickly loads no jax."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = ("models", "roofline", "jaxrl")
MAX_FILE_LINES = 400  # the house rule: a longer file wants splitting
SOURCES = [path for package in ORDER for path in sorted((ROOT / package).rglob("*.py"))]
JAX_FREE = (
    "jaxrl/types.py",
    "jaxrl/config.py",
    "jaxrl/errors.py",
    "jaxrl/cli.py",
    "jaxrl/run_folder.py",
    "jaxrl/tasks/*.py",
    "jaxrl/rewards/*.py",
    "jaxrl/telemetry/*.py",
    "models/config.py",
    "roofline/*.py",  # calibrate, which measures devices, is a folder below
)


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, top-level package) of every import in the file, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parts[0]  # of a relative import: its own
            name = package if node.level else (node.module or "").partition(".")[0]
            yield node.lineno, name


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_a_package_imports_only_what_stands_left_of_it(path):
    package = path.relative_to(ROOT).parts[0]
    right = ORDER[ORDER.index(package) + 1 :]
    wrong = [f"line {line}: {name}" for line, name in _imported(path) if name in right]
    assert not wrong, f"{_name(path)} may not import {right}: {wrong}"


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_flax_is_imported_only_in_models(path):
    uses_flax = any(name == "flax" for _, name in _imported(path))
    assert not uses_flax or path.is_relative_to(ROOT / "models"), _name(path)


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_a_file_fits_on_a_few_screens(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES, _name(path)


def test_records_configuration_tasks_and_roofline_load_no_jax():
    modules = [_module(path) for pattern in JAX_FREE for path in sorted(ROOT.glob(pattern))]
    assert len(modules) >= len(JAX_FREE)
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    if 'jax' in sys.modules: sys.exit(f'{name} loads jax')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *modules],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_wheel_lists_exactly_the_three_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert sorted(wheel["packages"]) == sorted(ORDER)
    assert wheel["force-include"] == {"configs": "jaxrl/configs"}
    assert all((ROOT / package / "__init__.py").is_file() for package in ORDER)


def test_every_folder_of_sources_is_a_package():
    folders = {path.parent for path in SOURCES}
    assert not [_name(folder) for folder in folders if not (folder / "__init__.py").is_file()]


def test_tests_are_no_package():
    assert not list((ROOT / "tests").rglob("__init__.py"))
