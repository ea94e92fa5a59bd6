"""Optimizers whose update happens inside the backward pass: usable from any PyTorch loop, without the rest of the
engine.

`fused.py` holds the hooks and the bookkeeping, `lomo.py` and `adalomo.py` one pure update function each.
"""

from lomo_core.optim.adalomo import AdaLomo
from lomo_core.optim.lomo import Lomo

__all__ = ["AdaLomo", "Lomo"]
