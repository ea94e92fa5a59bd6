"""The engine: fine-tunes all parameters of a causal language model in about the memory that inference takes.

It knows no web and no database. The service starts it as `python -m lomo_core train run.json` and reads its journal
(`events.py`); somebody with a plain PyTorch loop takes `lomo_core.optim` alone. This file stays free of imports: the
torch-free modules (`config`, `events`, `errors`, `schedule`) are read by processes that must not load torch.
"""
