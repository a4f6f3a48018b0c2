"""The card of a model that came without one: what it is, and how to run it."""

from fathom.config import ModelConfig
from fathom.convert.source import TensorSource
from fathom.sizing.count import cache_bytes_per_token, num_active_params, num_params


def model_card(cfg: ModelConfig, source: TensorSource) -> str:
    """``README.md`` in Hugging Face's form. The licence is the owner's to say."""
    types = sorted({str(e.dtype).removeprefix("torch.") for e in source.entries.values()})
    rows = {
        "parameters": f"{num_params(cfg):,}",
        "active per token": f"{num_active_params(cfg):,}",
        "layers": f"{cfg.n_layers}",
        "width": f"{cfg.dim}",
        "vocabulary": f"{cfg.vocab_size:,}",
        "context": f"{cfg.max_seq_len:,} tokens",
        "cache per token": f"{cache_bytes_per_token(cfg):,} bytes in bfloat16",
        "stored as": ", ".join(types),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
license: unknown
---

# A model written by Fathom

| | |
|---|---|
{table}

Who publishes this model states its licence above, and here what it was trained on.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this folder", dtype="auto")
```
"""
