"""A :class:`Look` as one HTML file that needs nothing else: no network, no library.

What the model's vocabulary or the user's text says is data in the page, never markup; the page's
own script is the only one that its policy lets run.
"""

import base64
import hashlib
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import Tensor

from fathom.inspect.selection import Look

PAGE = Path(__file__).parent / "page"


def write_page(look: Look, out: Path, *, title: str, head: int = 0) -> Path:
    """Write the page; ``head`` is shown first.

    Raises:
        ValueError: no such head.
    """
    heads = len(look.weights_HTT)
    if not 0 <= head < heads:
        raise ValueError(f"head must be from 0 to {heads - 1}, got {head}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(render(look, title=title, head=head), encoding="utf-8")
    return out


def render(look: Look, *, title: str, head: int = 0) -> str:
    """The page's whole text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    script = (PAGE / "selection.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("selection.html.j2").render(
        look=look,
        title=title,
        data=_data(look, head),
        style=(PAGE / "selection.css").read_text(encoding="utf-8"),
        script=script,
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
    )


def _data(look: Look, head: int) -> dict[str, Any]:
    """What the script draws: weights as bytes, each row's square roots over its largest."""
    heights = look.weights_HTT / look.weights_HTT.amax(-1, keepdim=True).clamp(min=1e-30)
    data: dict[str, Any] = {
        "tokens": look.tokens,
        "head": head,
        "heads": len(look.weights_HTT),
        "weights": _bytes((heights.sqrt() * 255).round()),
    }
    if look.read_TIJ is None or look.selected_TI is None or look.best_TI is None:
        return data
    return data | {
        "blockSize": look.block_size,
        "selections": look.read_TIJ.shape[1],
        "blocks": look.read_TIJ.shape[2],
        "read": _bytes(look.read_TIJ.transpose(0, 1)),
        "selected": _bytes((look.selected_TI.T * 255).round()),
        "best": _bytes((look.best_TI.T * 255).round()),
    }


def _bytes(values: Tensor) -> str:
    return base64.b64encode(values.to(torch.uint8).contiguous().numpy().tobytes()).decode()
