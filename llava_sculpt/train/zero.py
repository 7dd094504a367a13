"""The one module that knows how an engine stores a parameter: plain torch, DDP, or DeepSpeed ZeRO.

Under ZeRO a parameter exists several times: the working copy that the forward pass reads (bf16, and sharded with
ZeRO-3), an fp32 master copy and Adam's moments (both sharded over the ranks). DeepSpeed's own setters write only
the sharded fp32 ones, so the next forward would still see old values: here all of them are written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn


def is_zero_parameter(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed's ZeRO optimizer keeps a master copy of this parameter."""
    return hasattr(parameter, "_hp_mapping") or is_partitioned(parameter)


def is_partitioned(parameter: torch.Tensor) -> bool:
    """Whether each process holds only a piece of this parameter (ZeRO-3)."""
    return hasattr(parameter, "ds_id")


def local_piece(parameter: Any) -> tuple[torch.Tensor, int]:
    """This process's piece of a ZeRO-3 parameter: (flat working copy, index of its first entry in the whole)."""
    piece = parameter.ds_tensor
    start = piece.ds_numel * dist.get_rank(parameter.ds_process_group)
    # The last piece is padded with uninitialised memory.
    return piece.detach().flatten()[: max(0, parameter.ds_numel - start)], start


def gathered(parameters: list[nn.Parameter]) -> AbstractContextManager[None]:
    """Inside, ZeRO-3 parameters are whole on every process, for reading. Collective."""
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def nonzero_entries(parameters: Iterable[nn.Parameter]) -> int:
    """Non-zero entries over all parameters, counted in the working copies. Collective under ZeRO-3.

    All on the device, for whose result the host waits once.
    """
    whole, pieces = [], []
    for parameter in parameters:
        if is_partitioned(parameter):
            pieces.append(torch.count_nonzero(local_piece(parameter)[0]).to(parameter.device))
        else:
            whole.append(torch.count_nonzero(parameter.detach()))
    counts = [torch.stack([count.to(group[0].device) for count in group]).sum() for group in (whole, pieces) if group]
    if pieces:
        dist.all_reduce(counts[-1])
    return sum(map(int, counts))


def start_gloo() -> None:
    """Set up DeepSpeed's communication on the CPU, in a process that a launcher has started."""
    import deepspeed

    deepspeed.comm.init_distributed(dist_backend="gloo")


def everyones(value: Any) -> list[Any]:
    """`value` of every process, by rank. Collective."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def leave_together() -> None:
    """Wait until every process is done, then end their communication. Call it last; one process alone does nothing.

    A process that exits with it open may abort, and the launcher then ends the others, also the one that still saves.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def engine_of_checkpoint(checkpoint: Path) -> tuple[int, int] | None:
    """(ZeRO stage, processes) that wrote a checkpoint, None if DeepSpeed did not. DeepSpeed's file names tell."""
    processes = len(list(checkpoint.glob("global_step*/*zero_pp_rank_*_optim_states.pt")))
    if processes == 0:
        return None
    return (3 if any(checkpoint.glob("global_step*/zero_pp_rank_*_model_states.pt")) else 2), processes


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
    copies = {}
    for name, parameter in named:
        if is_partitioned(parameter):
            with gathered([parameter]):
                copies[name] = parameter.detach().clone()
        else:
            copies[name] = parameter.detach()
    return copies


@torch.no_grad()
def write_working_copies(parameters: Mapping[str, nn.Parameter], values: Mapping[str, torch.Tensor]) -> None:
    """Overwrite by name what the forward pass computes with; the optimizer's copies stay. Collective under ZeRO-3."""
    for name, parameter in parameters.items():
        if is_partitioned(parameter):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(values[name])
        else:
            parameter.copy_(values[name])


@torch.no_grad()
def write_masked(parameter: nn.Parameter, mask: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Set every pruned entry to 0 wherever the engine keeps it: working copy, master copy, optimizer moments.

    Args:
        parameter: shape (m, n) (empty between forwards under ZeRO-3).
        mask: bool (m, n), True where kept, on the parameter's device.
        optimizer: what updates the parameter: the torch optimizer, or DeepSpeed's ZeRO optimizer. Collective under
            ZeRO. At least one step must have been taken.
    """
    if is_zero_parameter(parameter):
        _write_masked_zero(parameter, mask, optimizer)
        return
    parameter.masked_fill_(~mask, 0)
    for value in optimizer.state.get(parameter, {}).values():
        if torch.is_tensor(value) and value.shape == mask.shape:
            value.masked_fill_(~mask, 0)


def _write_masked_zero(parameter: nn.Parameter, mask: torch.Tensor, optimizer: Any) -> None:
    import deepspeed
    from deepspeed.utils import (
        safe_get_full_fp32_param,
        safe_get_full_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
    )

    if not is_partitioned(parameter):  # right after a resume ZeRO-2 has the moments but has not linked them yet
        optimizer._lazy_init_hp_params_optimizer_state()
    safe_set_full_fp32_param(parameter, safe_get_full_fp32_param(parameter).masked_fill(~mask, 0))
    for moment in ("exp_avg", "exp_avg_sq"):
        value = safe_get_full_optimizer_state(parameter, moment)
        safe_set_full_optimizer_state(parameter, value.masked_fill(~mask, 0), moment)
    if is_partitioned(parameter):
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.masked_fill_(~mask, 0)
    else:
        parameter.masked_fill_(~mask, 0)
