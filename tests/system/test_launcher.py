"""Which of several processes this one is, by each launcher's words."""

from __future__ import annotations

import os

import pytest

from buleyean_rl.errors import UsageError
from buleyean_rl.system.launcher import Place, check_whole_model, first_host, hidden, launched

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "400"}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_LOCALID": "2",
    "SLURM_STEP_NODELIST": "gpu[07-09,12],login",
    "SLURM_JOB_ID": "100001",
}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        ({"WORLD_SIZE": "1", "RANK": "0"}, None),
        ({"WORLD_SIZE": "", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, None),  # a job's script, outside of srun
        (TORCHRUN, Place(3, 8, 1, "node1", 400)),
        (SRUN, Place(5, 6, 2, "gpu07", 25001)),
        (SRUN | {"MASTER_ADDR": "a", "MASTER_PORT": "7"}, Place(5, 6, 2, "a", 7)),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, Place(1, 2)),
        ({"PMI_SIZE": "2", "PMI_RANK": "0", "MPI_LOCALRANKID": "0", "MASTER_ADDR": "b"}, Place(0, 2, 0, "b")),
    ],
)
def test_the_place_of_a_process(environment: dict[str, str], place: Place | None) -> None:
    assert launched(environment) == place


@pytest.mark.parametrize("rank", [{}, {"RANK": "2"}, {"RANK": "x"}])
def test_a_launcher_that_contradicts_itself_is_refused(rank: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=f"2 processes were started, and RANK is {rank.get('RANK', 'not set')}"):
        launched({"WORLD_SIZE": "2"} | rank)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("", None),
        ("a", "a"),
        ("a,b", "a"),
        ("n[3-5]", "n3"),
        ("n[03,07-9]", "n03"),
        ("n[1-2]-ib,m", "n1-ib"),
        ("c[0-1]n[4,6]", "c0n4"),
    ],
)
def test_the_first_host_of_slurms_list(hosts: str, first: str | None) -> None:
    assert first_host(hosts) == first


def test_the_launchers_words_are_hidden_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (TORCHRUN | SRUN).items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with hidden():
        assert launched() is None
        assert "LOCAL_RANK" not in os.environ
    assert dict(os.environ) == before


def test_a_sharded_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_whole_model()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="each process has a whole model: unset ACCELERATE_USE_FSDP"):
        check_whole_model()
