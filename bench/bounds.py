"""The bounds that the engine sets itself, checked over the results of `bench_engine.py`. Pure; torch-free.

Peers count with the better of their two allocator settings, for memory and for speed separately. For speed the better
is the one with the lower median, so that two settings are not two tries at a lucky step; its fastest step counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from bench.harness import table

Row = dict[str, Any]

# Memory above the weights, ours as a share of theirs. With checkpointing: little but the working set of a block is
# left. Without, the activations are the same for everybody.
CHECKPOINTED_SHARE_OF_LOMO_OPTIM = 0.25
CHECKPOINTED_SHARE_OF_ADAMW = 0.12
PLAIN_SHARE_OF_ANY = 0.8
# Tokens per CPU second, ours as a multiple of theirs.
SPEED_OF_LOMO_OPTIM = 1.1
SPEED_OF_SGD = 1.0
# Backward pass with hooks and updates, as a multiple of one without.
HOOKS = 1.1
# CPU seconds of a step, as a multiple of one without clipping.
CLIPPING = {"group": 1.05, "second_backward": 1.8, "spill_memory": 1.2, "spill_file": 1.2, "delayed": None}
# CPU seconds of a step with stochastic rounding, as a multiple of one that rounds to nearest; by tokens per row.
STOCHASTIC = {256: 1.08, 512: 1.04}

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Check:
    """A ratio and its bound. `bound` None: for information."""

    what: str
    value: float
    bound: float | None
    is_upper: bool
    detail: str

    @property
    def verdict(self) -> str:
        """met, missed, or nothing."""
        if self.bound is None:
            return ""
        return "met" if (self.value <= self.bound if self.is_upper else self.value >= self.bound) else "MISSED"


class Results:
    """Rows of the grid by cell and implementation."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows = [row for row in rows if "cpu_s_min" in row]
        self.hooks = [row for row in rows if "hooks" in row]

    def cells(self) -> list[tuple[str, int, int, bool]]:
        """(dtype, batch, seq, checkpointing), as first measured."""
        return list(dict.fromkeys(_cell(row) for row in self._rows))

    def of(self, cell: tuple[str, int, int, bool], implementation: str, optimizer: str, **extra: str) -> list[Row]:
        """All rows of one implementation: allocators and repeats. Only rows of one group are fit for a ratio of times:
        those of the clipping group come with `purpose="clipping"`."""
        wanted = {"implementation": implementation, "optimizer": optimizer} | _BARE | extra
        rows = [row for row in self._rows if _cell(row) == cell and wanted.items() <= row.items()]
        return rows if "purpose" in extra else [row for row in rows if row["purpose"] != "clipping"]


_BARE = {"rounding": "nearest", "clip": "none"}


def check_all(rows: list[Row]) -> list[Check]:
    """Every bound that these rows say something about."""
    results = Results(rows)
    return [
        check
        for part in (check_memory, check_speed, check_hooks, check_clipping, check_rounding)
        for check in part(results)
    ]


def check_memory(results: Results) -> Iterator[Check]:
    """Memory above the weights beside each peer."""
    for cell in results.cells():
        for optimizer, peers in _PEERS.items():
            ours = results.of(cell, "lomo_core", optimizer)
            for who in peers:
                if theirs := ours and results.of(cell, *who):
                    yield _memory(cell, ours, theirs)


# Whom each of ours is held against: AdaLomo against its namesake, Lomo against everybody.
_PEERS = {
    "lomo": (("lomo-optim", "lomo"), ("torch", "sgd"), ("torch", "adamw"), ("transformers", "lomo")),
    "adalomo": (("lomo-optim", "adalomo"), ("torch", "adamw")),
}


def _memory(cell: tuple[str, int, int, bool], ours: list[Row], theirs: list[Row]) -> Check:
    mine, other = (min(rows, key=_by("rss_above_weights_bytes")) for rows in (ours, theirs))
    bound: float | None = PLAIN_SHARE_OF_ANY
    if cell[3]:
        bound = {"lomo-optim": CHECKPOINTED_SHARE_OF_LOMO_OPTIM, "torch adamw": CHECKPOINTED_SHARE_OF_ADAMW}.get(
            other["implementation"] if other["implementation"] != "torch" else f"torch {other['optimizer']}"
        )
    sizes = [row["rss_above_weights_bytes"] for row in (mine, other)]
    return Check(
        f"memory {_name(cell)}: {mine['optimizer']} / {_who(other)}",
        sizes[0] / sizes[1],
        bound,
        is_upper=True,
        detail=f"{sizes[0] / _MIB:.0f} / {sizes[1] / _MIB:.0f} MiB",
    )


def check_speed(results: Results) -> Iterator[Check]:
    """Tokens per CPU second beside those who do the same update."""
    bounds = {"lomo-optim": SPEED_OF_LOMO_OPTIM, "torch": SPEED_OF_SGD}
    for cell in results.cells():
        for optimizer, who in _RACES:
            ours, theirs = results.of(cell, "lomo_core", optimizer), results.of(cell, *who)
            if ours and theirs:
                mine, other = (min(rows, key=_by("cpu_s_median")) for rows in (ours, theirs))
                speeds = [row["tokens_per_cpu_s"] for row in (mine, other)]
                yield Check(
                    f"speed {_name(cell)}: {optimizer} / {_who(other)}",
                    speeds[0] / speeds[1],
                    bounds[who[0]],
                    is_upper=False,
                    detail=f"{speeds[0]:.0f} / {speeds[1]:.0f} tokens per CPU s",
                )


_RACES = (
    ("lomo", ("lomo-optim", "lomo")),
    ("lomo", ("torch", "sgd")),
    ("adalomo", ("lomo-optim", "adalomo")),
)


def check_hooks(results: Results) -> Iterator[Check]:
    """Backward pass of a chain of tiny layers, with hooks and without."""
    for size in dict.fromkeys(row["hooks"] for row in results.hooks):
        least: dict[str, float] = {}
        for row in results.hooks:
            if row["hooks"] == size:
                name = row["implementation"]
                least[name] = min(row["backward_cpu_s"], least.get(name, row["backward_cpu_s"]))
        for name, bound in (("lomo_core", HOOKS), ("torch sgd", None), ("lomo-optim", None)):
            yield Check(
                f"hooks, {size} tensors: {name} / plain backward",
                least[name] / least["plain"],
                bound,
                is_upper=True,
                detail=f"{least[name] * 1e3:.1f} / {least['plain'] * 1e3:.1f} ms",
            )


def check_clipping(results: Results) -> Iterator[Check]:
    """Each way of clipping beside a bare step of the same group."""
    for cell in results.cells():
        bare = results.of(cell, "lomo_core", "lomo", purpose="clipping")
        for clip, bound in CLIPPING.items():
            rows = results.of(cell, "lomo_core", "lomo", purpose="clipping", clip=clip)
            if bare and rows:
                yield _slower(f"clipping {_name(cell)}: {clip} / none", rows, bare, bound)


def check_rounding(results: Results) -> Iterator[Check]:
    """Stochastic rounding beside rounding to nearest."""
    for cell in results.cells():
        nearest = results.of(cell, "lomo_core", "lomo")
        rows = results.of(cell, "lomo_core", "lomo", rounding="stochastic")
        if nearest and rows:
            yield _slower(f"rounding {_name(cell)}: stochastic / nearest", rows, nearest, STOCHASTIC[cell[2]])


def _slower(what: str, rows: list[Row], bare: list[Row], bound: float | None) -> Check:
    seconds = [min(row["cpu_s_min"] for row in part) for part in (rows, bare)]
    detail = f"{seconds[0]:.2f} / {seconds[1]:.2f} CPU s"
    return Check(what, seconds[0] / seconds[1], bound, is_upper=True, detail=detail)


def report(rows: list[Row], checks: list[Check]) -> str:
    """Tables for people: what was measured, and what it says about the bounds."""
    lines = [["step", "above weights, MiB", "CPU s min", "median", "tokens/CPU s", "tokens/s", "steps"]]
    lines += [_line(row) for row in rows if "cpu_s_min" in row]
    verdicts = [["bound", "is", "asked", "", "figures"]]
    for check in checks:
        asked = "" if check.bound is None else f"{'<=' if check.is_upper else '>='} {check.bound:g}"
        verdicts.append([check.what, f"{check.value:.3f}", asked, check.verdict, check.detail])
    missed = sum(check.verdict == "MISSED" for check in checks)
    asked_for = sum(check.bound is not None for check in checks)
    return f"{table(lines)}\n\n{table(verdicts)}\n\n{asked_for - missed} of {asked_for} bounds met\n"


def _line(row: Row) -> list[str]:
    return [
        f"{_name(_cell(row))} {_who(row)}",
        f"{row['rss_above_weights_bytes'] / _MIB:.0f}",
        f"{row['cpu_s_min']:.2f}",
        f"{row['cpu_s_median']:.2f}",
        f"{row['tokens_per_cpu_s']:.0f}",
        f"{row['tokens_per_s']:.0f}",
        str(row["num_steps"]),
    ]


def _cell(row: Row) -> tuple[str, int, int, bool]:
    return row["dtype"], row["batch"], row["seq"], row["checkpointing"]


def _name(cell: tuple[str, int, int, bool]) -> str:
    return f"{cell[0]} {cell[1]}x{cell[2]} {'ckpt' if cell[3] else 'plain'}"


def _who(row: Row) -> str:
    words = [row["implementation"], row["optimizer"], *(row[key] for key, bare in _BARE.items() if row[key] != bare)]
    return f"{' '.join(words)} [{row['allocator']}]"


def _by(column: str) -> Callable[[Row], float]:
    return lambda row: float(row[column])
