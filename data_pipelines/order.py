"""A shuffled order that needs no table: a keyed permutation of 0..n-1, computed for the places that are asked for.

A Feistel network permutes the next power of four, and places that fall outside 0..n-1 walk on until they fall inside
(Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). It is made of integer operations alone, so an order
stays the same on every machine and under every version of numpy, whose own shuffles may change.
"""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 8


def permute(places: np.ndarray, size: int, seed: int, epoch: int, name: str = "") -> np.ndarray:
    """Where each of `places` goes in the permutation of 0..size-1 that belongs to (seed, epoch, name).

    Args:
        places: integers in 0..size-1, any shape.

    Returns:
        int64, same shape; a bijection over all places.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    key = f"{seed}:{epoch}:{name}" if name else f"{seed}:{epoch}"
    digest = hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest()
    keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    result = np.asarray(places).astype(np.uint64)
    outside = np.ones(result.shape, dtype=bool)
    while outside.any():
        result[outside] = _feistel(result[outside], half, keys)
        outside = result >= size
    return result.astype(np.int64)


def _feistel(values: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    """A bijection of uint64 values below 2 ** (2 * half)."""
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed
