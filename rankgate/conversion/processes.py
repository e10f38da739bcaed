"""Processes that calibrate one model together, each on its share of the text; what follows is for the first one alone.

    torchrun --nproc-per-node 2 --no-python rankgate convert MODEL -o DIR

Second moments are sums over tokens: every process adds up its own, and an all-reduce makes the whole of each.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor

from rankgate.errors import RankgateError
from rankgate.methods.given import GroupStats


def join(device: str | None) -> None:
    """Meet the other processes, if torchrun has started several; on GPUs each takes the one of its number.

    Raises RankgateError if there are fewer GPUs than processes on this machine.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "LOCAL_RANK" not in os.environ or dist.is_initialized():
        return
    number, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count() if device != "cpu" else 0
    if gpus:
        if number >= gpus:
            raise RankgateError(f"process {number} has no GPU: start {gpus} processes, or use --device cpu")
        torch.cuda.set_device(number)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")


def joined() -> dist.ProcessGroup | None:
    """Those that have met."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def leads(processes: dist.ProcessGroup | None) -> bool:
    """Whether this process is the first of them, or the only one."""
    return processes is None or dist.get_rank(processes) == 0


def part() -> None:
    """Go on without the others: the first one with what follows, the others to their end (raises SystemExit)."""
    processes = joined()
    if processes is not None:
        first = leads(processes)
        dist.destroy_process_group()
        if not first:
            raise SystemExit(0)


def share_of(windows: Tensor, processes: dist.ProcessGroup) -> Tensor:
    """The windows that this process reads. Raises RankgateError if there are fewer windows than processes."""
    count = dist.get_world_size(processes)
    if len(windows) < count:
        raise RankgateError(f"{len(windows)} windows of text are too few for {count} processes; give more tokens")
    return windows[dist.get_rank(processes) :: count]


def add_up_(group: GroupStats, processes: dist.ProcessGroup) -> None:
    """Make the sums of one process those of all, and its sample the samples of all, one after the other."""
    rank, device = dist.get_rank(processes), group.C.device
    counts = torch.zeros(dist.get_world_size(processes), 2, dtype=torch.int64, device=device)
    counts[rank] = torch.tensor([group.tokens, len(group.sample)])
    for summed in (counts, group.C):
        dist.all_reduce(summed, group=processes)
    tokens, sampled = counts.T.tolist()
    start = sum(sampled[:rank])
    sample = torch.zeros(sum(sampled), group.sample.shape[1], device=device)
    sample[start : start + len(group.sample)] = group.sample.float()
    dist.all_reduce(sample, group=processes)
    group.tokens, group.sample = sum(tokens), sample.to(group.sample.dtype)
