"""Real models for the engine's tests, and the prompts they are asked."""

from __future__ import annotations

from pathlib import Path

import pytest


def cached_model(name: str) -> Path:
    """Path of a catalogue model, fetched when it is not there; skips the test where it cannot be had."""
    from ragate import catalog
    from ragate.errors import CatalogError

    try:
        return catalog.model_path(name)
    except CatalogError as e:
        if name == "smollm2-135m":
            raise  # not optional
        pytest.skip(f"{name} cannot be had: {e}")


PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a small village by the sea,",
    "Q: What is 12 times 11?\nA:",
    "The three laws of thermodynamics state that",
    "SELECT name, COUNT(*) FROM orders WHERE",
    "A block table maps",
    "In 1969, humans first",
    "Water boils at 100 degrees Celsius because",
    "import numpy as np\n\ndef softmax(x):\n    ",
    "The quick brown fox",
    "To make a good cup of tea, first",
    "Le chat est assis sur",
    "Photosynthesis is the process by which",
    "1, 1, 2, 3, 5, 8,",
    '{"name": "Ada", "born": 1815, "field":',
    "Dear Sir or Madam,\n\nI am writing to",
    "The difference between a list and a tuple in Python is",
    "Mount Everest is",
    "# Installation\n\nRun the following command:\n\n```bash\n",
]
