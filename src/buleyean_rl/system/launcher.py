"""Which of several processes this one is, as its launcher has put it in the environment.

    torchrun, accelerate, Ray     RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT
    srun                          SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID, SLURM_STEP_NODELIST
    mpirun, mpiexec               OMPI_COMM_WORLD_*, PMI_*, MV2_COMM_WORLD_*

Nothing here loads torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from buleyean_rl.errors import UsageError

# Names of the number of processes, of this one's, and of its number on its host. torchrun sets the first; what srun
# sets in a job's script, outside of it, is not that of a step.
LAUNCHERS = (
    ("WORLD_SIZE", "RANK", "LOCAL_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
)
SHARDED = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_TP")
PORT = 29500  # torchrun's
SLURM_PORTS = 15000, 15000  # the first, and how many: jobs that share a host have different ones


class Place(NamedTuple):
    """A process among those that its launcher has started.

    Args:
        rank: its number.
        size: number of all.
        local_rank: its number among those of its host.
        address: of the host of the first process; None where nothing says it.
        port: where that one listens.
    """

    rank: int
    size: int
    local_rank: int = 0
    address: str | None = None
    port: int = PORT


def launched(environment: dict[str, str] | None = None) -> Place | None:
    """The place of this process among several; None where it is the only one.

    Args:
        environment: None for the process's own.

    Raises:
        UsageError: the launcher has set what contradicts itself.
    """
    variables = dict(os.environ) if environment is None else environment
    for size_name, rank_name, local_name in LAUNCHERS:
        if (size := _number(variables, size_name) or 0) <= 1:
            continue
        rank = _number(variables, rank_name)
        if rank is None or not 0 <= rank < size:
            raise UsageError(
                f"{size_name} says that {size} processes were started, and {rank_name} is "
                f"{variables.get(rank_name, 'not set')}: start them with torchrun, accelerate, Ray or srun"
            )
        address, port = variables.get("MASTER_ADDR"), _number(variables, "MASTER_PORT")
        if size_name.startswith("SLURM"):
            address = address or first_host(variables.get("SLURM_STEP_NODELIST", ""))
            port = port or SLURM_PORTS[0] + (_number(variables, "SLURM_JOB_ID") or 0) % SLURM_PORTS[1]
        return Place(rank, size, _number(variables, local_name) or 0, address, port or PORT)
    return None


def is_first() -> bool:
    """Whether this is the only process, or the first of several, which prints."""
    place = launched()
    return place is None or place.rank == 0


def check_whole_model() -> None:
    """Refuse a launcher that asks to shard the model.

    Raises:
        UsageError: names the variable.
    """
    for name in SHARDED:
        if os.environ.get(name, "").lower() in ("1", "true", "yes"):
            raise UsageError(f"each process has a whole model: unset {name}, or configure accelerate without it")


@contextmanager
def hidden() -> Iterator[None]:
    """An environment without the launcher's words within: transformers and accelerate see one process.

    They would wrap the model for a forward pass that training does not use, and deal records so that some come twice.
    """
    names = {name for launcher in LAUNCHERS for name in launcher}
    taken = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)


def first_host(hosts: str) -> str | None:
    """The first of a list as SLURM writes it: `node[07-09,12],login` is node07, node08, ...; None of an empty one."""
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", hosts).partition(",")[0] or None


def _number(variables: dict[str, str], name: str) -> int | None:
    text = variables.get(name, "").strip()
    return int(text) if text.lstrip("-").isdigit() else None
