"""Pictures of what a trained model does with one text: ``fathom inspect``."""

from fathom.inspect.selection import Look, look
from fathom.inspect.selection_page import write_page

__all__ = ["Look", "look", "write_page"]
