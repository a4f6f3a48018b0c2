"""What a command line means by MODEL and by ``--data``."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch

from fathom import api
from fathom.console import note
from fathom.convert.fetch import OFFERS, located
from fathom.convert.hub import revision_of
from fathom.convert.run_folder import CONFIG, find_checkpoint
from fathom.convert.source import Progress
from fathom.data.config import DataConfig
from fathom.data.dataset import Dataset, open_dataset
from fathom.data.texts import decoded, read_texts
from fathom.data.tokenizer import Tokenizer
from fathom.generate.engine import BUNDLED_BY_SIZE, missing_tokenizer, tokenizer_of
from fathom.layers.base import require
from fathom.model import Decoder
from fathom.presets import PRESETS
from fathom.settings import parse, read_toml
from fathom.sizing.count import num_params
from fathom.train.config import Device, read_run_config
from fathom.train.device import pick_device
from fathom.train.schedule import rows_at

META = "meta.json"  # of a prepared corpus
MAX_RANDOM_PARAMS = 2_000_000_000


def is_preset(model: str) -> bool:
    """Whether a name means a preset: every known one does, others where nothing is called so."""
    path = Path(model)
    return model in PRESETS or not (path.exists() or len(path.parts) > 1 or model in OFFERS)


def open_model(
    model: str,
    *,
    device: torch.device,
    dtype: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Decoder:
    """A run or checkpoint folder's model; a preset's with random weights, if it is small.

    Raises:
        ValueError: no such thing, or a preset too large to be filled with random numbers.
    """
    if not is_preset(model):
        path = located(model)
        if (revision := revision_of(path)) is not None:
            note(f"revision {revision}: pin it with {model.partition('@')[0]}@{revision}")
        return api.load(path, dtype=dtype, device=device, progress=progress)
    params = num_params(cfg := api.resolve(model))
    require(
        params <= MAX_RANDOM_PARAMS,
        f"{model} is a preset of {params:,} parameters: random weights are made up to "
        f"{MAX_RANDOM_PARAMS:,}; give a run folder, or a smaller preset",
    )
    return api.build(cfg, seed=seed, device=device, dtype=dtype or "float32")


def open_data(
    model: str, built: Decoder, source: str | None, max_bytes: int | None = None
) -> tuple[Dataset, DataConfig]:
    """The data to measure a model on: ``source``, else its run's, else the bundled corpus.

    Args:
        source: a prepared corpus, the word bundled, or files of text. What was prepared with
            another tokenizer than the model's is encoded again with the model's.
        max_bytes: so much of each domain will be read, if it must be encoded again.

    Raises:
        ValueError: no such data, or none that the model can read.
    """
    tokenizer, cfg = tokenizer_of(built), _recorded(model, built)
    if source is not None and source != cfg.source:
        vocabulary = DataConfig().tokenizer
        if source == "bundled":
            vocabulary = BUNDLED_BY_SIZE.get(built.cfg.vocab_size, vocabulary)
        cfg = replace(cfg, source=source, tokenizer=vocabulary, weights={})
    path = Path(cfg.source)
    if tokenizer is not None and path.exists() and not (path / META).exists():
        return read_texts([path], tokenizer), cfg
    dataset = open_dataset(cfg)
    if tokenizer is None or tokenizer.fingerprint() == dataset.tokenizer.fingerprint():
        _require_readable(built, dataset, tokenizer)
        return dataset, cfg
    return decoded(dataset, tokenizer, max_bytes), cfg


def _recorded(model: str, built: Decoder) -> DataConfig:
    """The data that a run was trained on; the bundled corpus for any other model."""
    vocabulary = BUNDLED_BY_SIZE.get(built.cfg.vocab_size, DataConfig().tokenizer)
    foreign = getattr(built, "origin", None) is not None
    if not foreign and not is_preset(model):
        recorded = read_toml(find_checkpoint(Path(model), hashes=False) / CONFIG).get("data")
        if recorded is not None:
            return parse(DataConfig, recorded)
    seq_len = min(1024 if foreign else 256, built.cfg.max_seq_len)
    return DataConfig(tokenizer=vocabulary, seq_len=seq_len)


def _require_readable(built: Decoder, dataset: Dataset, tokenizer: Tokenizer | None) -> None:
    if tokenizer is None and dataset.tokenizer.vocab_size > built.cfg.vocab_size:
        raise missing_tokenizer(built)


def batches_of(source: str, seq_len: int | None) -> tuple[DataConfig, int, int]:
    """What is read, in batches of how many rows, in the order of which seed.

    Args:
        source: a run's config or folder; else ``bundled`` or a prepared folder, by four rows.
        seq_len: None: the run's, or the default.
    """
    path = Path(source)
    config = path / CONFIG if (path / CONFIG).is_file() else path
    if config.suffix == ".toml":
        run = read_run_config(config)
        rows = run.train.micro_batch_size or rows_at(run, 0)
        data, seed = run.data, run.train.seed
    else:
        data, rows, seed = DataConfig(source=source), 4, 0
    return replace(data, seq_len=seq_len or data.seq_len), rows, seed


def pick(device: str) -> torch.device:
    """The device of that name; auto is cuda where there is one, else cpu."""
    known = get_args(Device)
    require(device in known, f"--device must be one of {', '.join(known)}, got {device!r}")
    return pick_device(device)  # pyright: ignore[reportArgumentType]
