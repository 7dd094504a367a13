"""Run by DeepSpeed's launcher: two steps of a small model; writes the bytes that one process's engine really holds.

python held.py STAGE OUT.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch

from tests.train.test_plan import batch_of, build, setup_of, small_config


def tensors_in(thing: Any) -> Iterator[torch.Tensor]:
    if torch.is_tensor(thing):
        yield thing
    elif isinstance(thing, dict):
        yield from tensors_in(list(thing.values()))
    elif isinstance(thing, (list, tuple)):
        for value in thing:
            yield from tensors_in(value)
        yield from tensors_in(getattr(thing, "flat_partition", None))


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def main(stage: int, out: Path) -> None:
    config = small_config(1000, layers=4)
    setup = setup_of(config, lora_r=64, checkpointing=False)
    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    model = build(config, setup)
    zero = {
        "stage": stage,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": 1_000_000,
        "stage3_param_persistence_threshold": 0,
    }
    engine, optimizer, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "bf16": {"enabled": True},
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    in_buckets = 0

    def measure_buckets() -> None:
        nonlocal in_buckets
        buffers = [bucket.buffer for bucket in optimizer.ipg_buckets.values()]
        in_buckets = max(in_buckets, storage_bytes(tensors_in(buffers)))

    if stage == 2:  # it lets go of its buckets at the end of backward
        release = optimizer._release_ipg_buffers

        def measure_and_release() -> None:
            measure_buckets()
            release()

        optimizer._release_ipg_buffers = measure_and_release

    for _ in range(2):
        batch = batch_of(config, setup)
        batch["pixel_values"] = batch["pixel_values"].bfloat16()
        loss = engine(**batch).loss
        in_buckets = 0
        measure_buckets()
        engine.backward(loss)
        del loss, batch
        partition = optimizer.grad_partitions_flat_buffer if stage == 3 else optimizer.averaged_gradients
        gradients = storage_bytes(tensors_in(partition)) + in_buckets
        engine.step()

    masters = optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
    states = tensors_in(list(optimizer.optimizer.state.values()))
    parameters = [(getattr(p, "ds_tensor", p), p.requires_grad) for p in model.parameters()]
    held = {
        "optimizer": storage_bytes([*masters, *states]),
        "frozen": storage_bytes(value for value, trained in parameters if not trained),
        "trained": storage_bytes(value for value, trained in parameters if trained),
        "gradients": gradients,
    }
    if torch.distributed.get_rank() == 0:
        out.write_text(json.dumps(held))


if __name__ == "__main__":
    # The launcher puts --local_rank before the script's own arguments.
    stage, out = [word for word in sys.argv[1:] if not word.startswith("--")]
    main(int(stage), Path(out))
