"""Text from a model: sampling, stop strings, and the engine that decodes with a cache."""

from fathom.generate.engine import Engine, Generation

__all__ = ["Engine", "Generation"]
