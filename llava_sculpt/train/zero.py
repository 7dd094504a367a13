"""The one module that knows how an engine stores a parameter: plain torch, DDP, or DeepSpeed ZeRO.

Under ZeRO a parameter exists several times: the working copy that the forward pass reads (bf16, and sharded with
ZeRO-3), an fp32 master copy and Adam's moments (both sharded over the ranks). DeepSpeed's own setters write only
the sharded fp32 ones, so the next forward would still see old values: here all of them are written.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def is_zero_parameter(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed's ZeRO optimizer keeps a master copy of this parameter."""
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")


def full_value(parameter: nn.Parameter) -> torch.Tensor:
    """The parameter's exact current value, full shape: the fp32 master copy where there is one.

    Collective under ZeRO: every rank must call it, and every rank gets the same values.
    """
    if not is_zero_parameter(parameter):
        return parameter.detach()
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter)


def gather_working_copies(named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, torch.Tensor]:
    """Full working copies by name: what the forward pass computes with, and what is saved. Collective under ZeRO-3."""
    gathered = {}
    for name, parameter in named:
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                gathered[name] = parameter.detach().clone()
        else:
            gathered[name] = parameter.detach()
    return gathered


@torch.no_grad()
def write_masked(parameter: nn.Parameter, mask: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Set every pruned entry to 0 wherever the engine keeps it: working copy, master copy, optimizer moments.

    Args:
        parameter: shape (m, n) (empty between forwards under ZeRO-3).
        mask: bool (m, n), True where kept, on the parameter's device.
        optimizer: the torch optimizer (innermost) that updates the parameter. Collective under ZeRO.
    """
    if is_zero_parameter(parameter):
        _write_masked_zero(parameter, mask)
        return
    parameter.masked_fill_(~mask, 0)
    for value in optimizer.state.get(parameter, {}).values():
        if torch.is_tensor(value) and value.shape == mask.shape:
            value.masked_fill_(~mask, 0)


def _write_masked_zero(parameter: nn.Parameter, mask: torch.Tensor) -> None:
    import deepspeed
    from deepspeed.utils import (
        safe_get_full_fp32_param,
        safe_get_full_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
    )

    safe_set_full_fp32_param(parameter, safe_get_full_fp32_param(parameter).masked_fill(~mask, 0))
    for moment in ("exp_avg", "exp_avg_sq"):
        value = safe_get_full_optimizer_state(parameter, moment)
        if value is not None:  # no optimizer step was taken yet
            safe_set_full_optimizer_state(parameter, value.masked_fill(~mask, 0), moment)
    if hasattr(parameter, "ds_id"):
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.masked_fill_(~mask, 0)
    else:
        parameter.masked_fill_(~mask, 0)
