"""Every random choice of the engine as a pure function of (seed, what it is for).

Nothing depends on the history of a generator: the noise of a step, the order of an epoch and the dropout of a step
can be recomputed from the seed and the step alone, which is what makes a resumed run equal to an uninterrupted one
bit for bit. Torch-free.
"""

from __future__ import annotations

_MASK = 0xFFFFFFFFFFFFFFFF
# Constants of splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def mix(*words: int) -> int:
    """Hash integers to 64 bits: splitmix64's finaliser, chained over the words."""
    h = 0
    for word in words:
        h = ((h ^ word) + _GAMMA) & _MASK
        h = ((h ^ (h >> 30)) * _MIX_1) & _MASK
        h = ((h ^ (h >> 27)) * _MIX_2) & _MASK
        h ^= h >> 31
    return h


def shuffled(items: list[int], *words: int) -> list[int]:
    """Return `items` in an order that depends on the words and on the places in the list alone."""
    order = sorted(range(len(items)), key=lambda place: mix(*words, place))
    return [items[place] for place in order]
