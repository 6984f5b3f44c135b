"""Text, such as a mission, as numbers that a network can read."""

import hashlib
import re

import gymnasium
import numpy as np

WORDS = 32
_SIZE = 16


def space() -> gymnasium.spaces.Box:
    """Returns the space of `embed`: [WORDS * 16] float32."""
    return gymnasium.spaces.Box(-1, 1, (WORDS * _SIZE,), np.float32)


def embed(text: str) -> np.ndarray:
    """Returns [WORDS * 16] float32: sixteen signs for each word, zeros after the last.

    The signs of a word are bits of its hash: they are the same everywhere, need no vocabulary, and
    tell any two words apart but for one pair in 65,536. Case and punctuation are ignored, and so
    are words after the 32nd.
    """
    signs = np.zeros((WORDS, _SIZE), np.float32)
    for row, word in zip(signs, re.findall(r'\w+', text.lower()), strict=False):
        digest = hashlib.sha256(word.encode()).digest()
        bits = np.unpackbits(np.frombuffer(digest, np.uint8, count=_SIZE // 8))
        row[:] = 2.0 * bits - 1.0
    return signs.reshape(-1)
