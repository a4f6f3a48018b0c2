"""What a config costs, from its numbers alone: no tensor is made."""

from fathom.sizing.size import Size, size

__all__ = ["Size", "size"]
