"""The three ways to use the package: a wheel, an editable install, and a checkout on PYTHONPATH."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("vmeanba_fx", "passes", "cuda")
# Imports everything, loads the shipped weights, finds the CUDA sources, all from where it is told.
USE = """
import pathlib, pkgutil, importlib, sys
{setup}
import vmeanba_fx
for module in pkgutil.walk_packages(vmeanba_fx.__path__, "vmeanba_fx."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from vmeanba_fx.models import vmamba_digits
from vmeanba_fx.passes import mean_scan
vmamba_digits(pretrained=True)
package = pathlib.Path(vmeanba_fx.__file__).resolve().parent
sources = [p for p in (package / "cuda", package.parent / "cuda") if p.is_dir() and list(p.glob("*.cu"))]
assert sources, "no CUDA sources"
assert "passes" not in sys.modules and "cupy" not in sys.modules and "matplotlib" not in sys.modules
print(package)
"""


def _can_build():
    try:
        importlib.metadata.version("pip")
        return int(importlib.metadata.version("setuptools").split(".")[0]) >= 77
    except importlib.metadata.PackageNotFoundError:
        return False


needs_setuptools = pytest.mark.skipif(
    not _can_build(), reason="building needs pip and setuptools 77 in this environment: pip install 'setuptools>=77'"
)


def pip(*argv, cwd):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, argv)]
    done = subprocess.run([*command, "--no-deps", "--no-build-isolation"], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def use(cwd, python_path="unused", setup=""):
    """Folder of the package that a fresh process in ``cwd`` imports.

    The process sees this one's site-packages as plain folders (-S): an editable install there must not answer for it.
    """
    installed = [folder for folder in sys.path if folder.endswith("-packages")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(python_path), *installed])}
    command = [sys.executable, "-S", "-c", USE.format(setup=setup)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources: building in place would leave folders behind."""
    target = tmp_path_factory.mktemp("checkout")
    for folder in SOURCES:
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    return target


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", ".", "--wheel-dir", folder, cwd=checkout)
    (found,) = folder.glob("*.whl")
    return found


@needs_setuptools
def test_the_wheel_holds_every_source_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        entry_points = archive.read(next(n for n in archive.namelist() if n.endswith("entry_points.txt"))).decode()
        licensed = any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    expected = {"vmeanba_fx/py.typed"}
    for folder in SOURCES:
        installed = folder if folder == "vmeanba_fx" else f"vmeanba_fx/{folder}"
        for pattern in ("*.py", "*.cu", "*.cuh", "*.safetensors"):
            for path in (ROOT / folder).rglob(pattern):
                expected.add(f"{installed}/{path.relative_to(ROOT / folder).as_posix()}")
    assert packed == expected
    assert any(name.endswith(".cu") for name in packed) and any(name.endswith(".safetensors") for name in packed)
    assert "vmeanba-fx = vmeanba_fx.cli:main" in entry_points and licensed


@needs_setuptools
def test_the_wheel_works(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    assert use(tmp_path, tmp_path / "site") == (tmp_path / "site" / "vmeanba_fx").resolve()


@needs_setuptools
def test_an_editable_install_works(checkout, tmp_path):
    pip("install", "--prefix", tmp_path, "--editable", checkout, "--ignore-installed", cwd=tmp_path)
    (site,) = tmp_path.rglob("site-packages")
    setup = f"import site; sys.path.insert(0, {str(site)!r}); site.addsitedir({str(site)!r})"
    assert use(tmp_path, setup=setup) == (checkout / "vmeanba_fx").resolve()


def test_a_checkout_works_without_an_install(tmp_path):
    assert use(tmp_path, ROOT) == ROOT / "vmeanba_fx"
