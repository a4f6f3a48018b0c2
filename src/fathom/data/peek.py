"""``fathom data peek``: what batch N holds, in words a person can check."""

from fathom.data.assemble import printable
from fathom.data.config import DataConfig
from fathom.data.dataset import Dataset
from fathom.data.images import WIDTH, show_image
from fathom.data.loader import Loader
from fathom.data.stream import Piece


def peek(dataset: Dataset, cfg: DataConfig, batch: int, *, seed: int = 0, batch_size: int) -> str:
    """Batch number ``batch`` (from 0) of a run: row by row, each piece with its document's name.

    A piece is headed by the document's tokens that it holds; ``|`` marks the borders of its text.
    Control characters are shown as ``?``, images as characters, dark to bright.
    """
    rows = Loader(dataset, cfg, batch_size=batch_size, seed=seed).peek_rows(batch)
    lines = []
    for number, pieces in enumerate(rows):
        lines.append(f"row {number}: {pieces[0].domain}, {len(pieces)} piece(s)")
        for piece in pieces:
            lines += [_heading(dataset, piece), _content(dataset, piece)]
    return "\n".join(lines)


def _heading(dataset: Dataset, piece: Piece) -> str:
    name = dataset.document_names("train", piece.domain)[piece.document]
    length = len(dataset.document("train", piece.domain, piece.document))
    parts = [("from its start" if piece.start == 0 else "continued")]
    parts.append("to its end" if piece.stop == length else "cut")
    where = f"tokens {piece.start} to {piece.stop} of {length}"
    return f"  {printable(name)}: {where}, {', '.join(parts)}"


def _content(dataset: Dataset, piece: Piece) -> str:
    ids = dataset.document("train", piece.domain, piece.document)[piece.start : piece.stop]
    tokenizer = dataset.tokenizer
    if dataset.kind(piece.domain) == "symbols":
        first = int(tokenizer.is_symbol.argmax())
        before = [0] * (max(piece.start - 1, 0) % WIDTH)  # keeps the columns of a cut image
        return show_image(before + [int(i) - first for i in ids if tokenizer.is_symbol[i]])
    text = tokenizer.decode(ids.tolist())
    return "|" + "\n".join(printable(line) for line in text.replace("\t", "    ").split("\n")) + "|"
