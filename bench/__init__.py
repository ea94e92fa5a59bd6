"""Measurements: how fast, how small and how good. Nothing of the product imports this; `docs/benchmarks.md` says
what each script claims and how it measures."""
