"""Fathom: from Llama to DeepSeek, one measured step at a time."""

__version__ = "0.1.0"
