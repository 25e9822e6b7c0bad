"""Randomness of ingest: keyed by names, never by the order in which threads or workers arrive."""

import hashlib
from collections.abc import Callable

import numpy as np


def key(*parts: object) -> int:
    """A 128-bit key of any printable parts."""
    return int.from_bytes(hashlib.blake2b("|".join(map(str, parts)).encode(), digest_size=16).digest(), "little")


def generator(*parts: object) -> np.random.Generator:
    """A generator whose numbers depend on `parts` alone."""
    return np.random.Generator(np.random.Philox(key=key(*parts)))


class Permutation:
    """A keyed permutation of range(n) in constant memory: a Feistel network with cycle walking."""

    _ROUNDS = 6

    def __init__(self, n: int, *parts: object) -> None:
        """Args: n: size, at least 1; parts: what the permutation depends on."""
        if n < 1:
            raise ValueError(f"a permutation of {n} items")
        self.n = n
        self._half = max(1, ((n - 1).bit_length() + 1) // 2)
        self._mask = np.uint64((1 << self._half) - 1)
        self._keys = generator(*parts).integers(0, 1 << 63, self._ROUNDS, dtype=np.uint64)

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """Images of `index`, int64 of any shape with values in 0..n-1, as int64.

        Raises:
            ValueError: an index out of range (cycle walking would never end).
        """
        return self._cycled(index, self._walk)

    def inverse(self, index: np.ndarray) -> np.ndarray:
        """Where the images of `index` come from: undoes a call; takes, gives and raises the same."""
        return self._cycled(index, self._walk_back)

    def _cycled(self, index: np.ndarray, walk: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Walks on from each index until the network, which permutes a power of 4, is back in range(n)."""
        values = np.asarray(index).astype(np.uint64)
        if values.size and int(values.max()) >= self.n:
            raise ValueError(f"index {int(values.max())} in a permutation of {self.n}")
        values = walk(values)
        while (outside := values >= self.n).any():
            values = np.where(outside, walk(values), values)
        return values.astype(np.int64)

    def _walk(self, values: np.ndarray) -> np.ndarray:
        half = np.uint64(self._half)
        left, right = values >> half, values & self._mask
        for round_key in self._keys:
            left, right = right, left ^ (_mixed(right ^ round_key) & self._mask)
        return (left << half) | right

    def _walk_back(self, values: np.ndarray) -> np.ndarray:
        half = np.uint64(self._half)
        left, right = values >> half, values & self._mask
        for round_key in self._keys[::-1]:
            left, right = right ^ (_mixed(left ^ round_key) & self._mask), left
        return (left << half) | right


def _mixed(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: every output bit depends on every input bit."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
