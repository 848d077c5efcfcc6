"""What is installed: three packages and the configurations; a foreign `models` is an error."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD_S = 240  # pip and hatchling take a few seconds; a loaded machine takes more


def _python(*words: str, path: Path | None = None, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=BUILD_S,
        check=False,
    )


@pytest.mark.parametrize("package", ["jaxrl", "roofline"])
@pytest.mark.parametrize("layout", ["models.py", "models/__init__.py"])
def test_a_foreign_models_is_named_with_the_remedy(package, layout, tmp_path):
    foreign = tmp_path / layout
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_text("")
    done = _python("-c", f"import {package}", path=ROOT, cwd=tmp_path)
    assert done.returncode != 0
    assert "ImportError" in done.stderr
    assert str(foreign) in done.stderr
    assert "python -P -m" in done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Folder into which the wheel of a copy of the checkout is unpacked by pip."""
    pytest.importorskip("hatchling", reason="needs hatchling, part of the dev extra")
    folder = tmp_path_factory.mktemp("packaging")
    copy, wheels, target = folder / "copy", folder / "wheels", folder / "site"
    ignored = shutil.ignore_patterns(".venv*", ".git", "runs", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, copy, ignore=ignored)
    pip = ("-m", "pip", "--disable-pip-version-check", "--no-input")
    built = _python(
        *pip, "wheel", str(copy), "--no-deps", "--no-build-isolation", "-w", str(wheels), cwd=folder
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = wheels.glob("jaxrl-*.whl")
    put = _python(
        *pip, "install", str(wheel), "--no-deps", "--no-index", "-t", str(target), cwd=folder
    )
    assert put.returncode == 0, put.stderr
    shutil.copy(wheel, folder / "jaxrl.whl")
    return target


@pytest.mark.slow
def test_the_wheel_holds_the_packages_the_configurations_and_nothing_else(installed):
    names = zipfile.ZipFile(installed.parent / "jaxrl.whl").namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "jaxrl",
        "models",
        "roofline",
    }
    shipped = {name for name in names if name.startswith("jaxrl/configs/")}
    ours = {path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*") if path.is_file()}
    assert shipped == {f"jaxrl/{path.as_posix()}" for path in ours}


@pytest.mark.slow
@pytest.mark.parametrize("module", ["jaxrl.train", "jaxrl.telemetry.trace", "roofline.report"])
def test_an_installed_entry_point_explains_itself_from_an_empty_folder(module, installed, tmp_path):
    done = _python("-m", module, "--help", path=installed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert module in done.stdout


@pytest.mark.slow
def test_an_installed_package_finds_its_configurations_by_name(installed, tmp_path):
    program = "from jaxrl import cli; print(cli.resolve_config('quickstart'))"
    done = _python("-c", program, path=installed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == installed / "jaxrl" / "configs" / "quickstart.yaml"
