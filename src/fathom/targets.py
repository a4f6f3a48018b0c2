"""What a command line means by MODEL and by ``--data``."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch

from fathom import api
from fathom.convert.fetch import OFFERS
from fathom.convert.run_folder import CONFIG, CheckpointError, find_checkpoint
from fathom.data.config import DataConfig
from fathom.data.dataset import Dataset, open_dataset
from fathom.generate.engine import BUNDLED_BY_SIZE, tokenizer_of
from fathom.layers.base import require
from fathom.model import Decoder
from fathom.presets import PRESETS
from fathom.settings import parse, read_toml
from fathom.sizing.count import num_params
from fathom.train.config import Device, read_run_config
from fathom.train.device import pick_device
from fathom.train.schedule import rows_at

MAX_RANDOM_PARAMS = 2_000_000_000


def is_preset(model: str) -> bool:
    """Whether a name means a preset: every known one does, others where nothing is called so."""
    path = Path(model)
    return model in PRESETS or not (path.exists() or len(path.parts) > 1 or model in OFFERS)


def open_model(
    model: str, *, device: torch.device, dtype: str | None = None, seed: int = 0
) -> Decoder:
    """A run or checkpoint folder's model; a preset's with random weights, if it is small.

    Raises:
        ValueError: no such thing, or a preset too large to be filled with random numbers.
    """
    if not is_preset(model):
        return api.load(model, dtype=dtype, device=device)
    params = num_params(cfg := api.resolve(model))
    require(
        params <= MAX_RANDOM_PARAMS,
        f"{model} is a preset of {params:,} parameters: random weights are made up to "
        f"{MAX_RANDOM_PARAMS:,}; give a run folder, or a smaller preset",
    )
    return api.build(cfg, seed=seed, device=device, dtype=dtype or "float32")


def open_data(model: str, built: Decoder, source: str | None) -> tuple[Dataset, DataConfig]:
    """The data to measure a model on: ``source``, else its run's, else the bundled corpus.

    Raises:
        ValueError: no such data, or of another tokenizer than the model's.
    """
    vocabulary = BUNDLED_BY_SIZE.get(built.cfg.vocab_size, DataConfig().tokenizer)
    cfg = DataConfig(tokenizer=vocabulary, seq_len=min(256, built.cfg.max_seq_len))
    if not is_preset(model):
        recorded = read_toml(find_checkpoint(Path(model), hashes=False) / CONFIG).get("data")
        cfg = cfg if recorded is None else parse(DataConfig, recorded)
    if source is not None and source != cfg.source:
        own = vocabulary if source == "bundled" else DataConfig().tokenizer
        cfg = replace(cfg, source=source, tokenizer=own, weights={})
    dataset = open_dataset(cfg)
    tokenizer = tokenizer_of(built)
    if tokenizer is not None and tokenizer.fingerprint() != dataset.tokenizer.fingerprint():
        raise CheckpointError(
            f"{model} was trained with another tokenizer than that of data {cfg.source}: the same "
            "ids mean other text; give --data a corpus prepared with the model's tokenizer.json"
        )
    return dataset, cfg


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
