"""Why a model wrapped in DistributedDataParallel is refused: its averaging comes after the fused update."""

from __future__ import annotations

import gc

import torch
from torch import Tensor


def refuse_data_parallel(param: Tensor) -> None:
    """Refuse a parameter of a model that is wrapped in DistributedDataParallel.

    Its hooks would see this process's gradient, update by it, and then a second time by the averaged one: replicas
    drift apart silently. Nothing on the parameter tells, so the live wrappers are looked through, only where a process
    group exists.

    Raises:
        RuntimeError: the parameter belongs to such a model.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    wrapper = torch.nn.parallel.DistributedDataParallel
    for found in gc.get_objects():
        if type(found) is wrapper and any(param is own for own in found.parameters()):
            raise RuntimeError(
                "the model is wrapped in DistributedDataParallel, which averages gradients only after the update here "
                "has used this process's own: the replicas would drift apart. Shard the model with "
                "torch.distributed.fsdp.fully_shard instead, or train on one device"
            )
