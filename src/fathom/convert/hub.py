"""Models of the Hugging Face hub by their names: ``owner/model``, or ``owner/model@revision``.

The library ``huggingface_hub`` (the extra ``hub``) fetches and caches, and follows ``HF_HOME``,
``HF_TOKEN``, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE``. It reads them when it is imported, so that is
done late. Only files that are read here are asked for; code and pickles never are.
"""

import importlib
import re
from pathlib import Path

from fathom.convert.run_folder import CheckpointError

NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w-][\w.-]*))?")
CONFIGS = ["*.json", "*.jinja"]
WEIGHTS = ["*.safetensors", "tokenizer.model", "merges.txt", "LICENSE*"]


def is_hub_name(model: str | Path) -> bool:
    """Whether a MODEL can be a name of the hub: of its form, and nothing here is called so.

    ``runs/tiny`` is not, where there is a folder ``runs``: then it is a mistyped path.
    """
    found = NAME.fullmatch(str(model)) if isinstance(model, str) else None
    return found is not None and not Path(found[1].partition("/")[0]).exists()


def hub_folder(model: str, *, weights: bool = True) -> Path:
    """The folder of a model in the hub's cache, fetched where it is not there yet.

    Its name is the revision, a commit's hash: :func:`revision_of`.

    Args:
        weights: False: only what describes the model.

    Raises:
        CheckpointError: the library is not installed, or the hub does not give the model.
    """
    found = NAME.fullmatch(model)
    assert found is not None
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError:
        raise CheckpointError(
            f"there is no folder {model} here, and for a model of the hub huggingface_hub is "
            "needed: pip install 'fathom-lm[hub]'"
        ) from None
    try:
        folder = hub.snapshot_download(
            found[1],
            revision=found[2],
            allow_patterns=[*CONFIGS, *(WEIGHTS if weights else [])],
            ignore_patterns=["*/*"],  # folders hold other formats of the same model
        )
    except Exception as error:  # of the network, the hub, the disk: many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"there is no folder {model} here, and the hub does not give it: {reason[:300]}"
        ) from None
    return Path(folder)


def revision_of(folder: Path) -> str | None:
    """The commit of a folder of the hub's cache; None for any other folder."""
    in_cache = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith(
        "models--"
    )
    return folder.name if in_cache else None
