"""Which parameters are trained, and with whose rate and decay, by patterns on their names. Torch-free: the same code
checks the names of a model that is not loaded yet."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lomo_core.config import OptimizerConfig
from lomo_core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedGroup:
    """Parameters that share a rate and a decay."""

    names: tuple[str, ...]
    learning_rate_scale: float
    weight_decay: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouping:
    """Every parameter of a model, once."""

    groups: tuple[NamedGroup, ...]
    """The run's own first, if it has any, then those of the patterns; names in the model's order."""
    frozen: frozenset[str]


def group_parameters(names: Sequence[str], config: OptimizerConfig) -> Grouping:
    """Sort names (a model's, tied weights once) into groups; the first pattern that matches takes a name, and the
    frozen ones are taken first.

    Raises:
        ConfigError: a pattern takes no parameter, or nothing is left to train.
    """
    left = list(names)
    frozen: set[str] = set()
    for pattern in config.frozen:
        taken = _take(left, pattern, names, param="frozen")
        frozen.update(taken)
    groups = []
    for group in config.param_groups:
        taken = _take(left, group.pattern, names, param="param_groups")
        decay = config.weight_decay if group.weight_decay is None else group.weight_decay
        groups.append(NamedGroup(names=tuple(taken), learning_rate_scale=group.learning_rate_scale, weight_decay=decay))
    if left:
        groups.insert(0, NamedGroup(names=tuple(left), learning_rate_scale=1.0, weight_decay=config.weight_decay))
    if not groups:
        raise ConfigError("every parameter is frozen: there is nothing to train", param="frozen")
    return Grouping(groups=tuple(groups), frozen=frozenset(frozen))


def _take(left: list[str], pattern: str, names: Sequence[str], *, param: str) -> list[str]:
    """Remove the names that match from `left` and return them."""
    taken = [name for name in left if re.search(pattern, name)]
    if not taken:
        of_others = any(re.search(pattern, name) for name in names)
        why = "whatever it matches is taken by an earlier one" if of_others else f"names are like {names[0]!r}"
        raise ConfigError(f"the pattern {pattern!r} takes no parameter: {why}", param=param)
    left[:] = [name for name in left if name not in set(taken)]
    return taken
