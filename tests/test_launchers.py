"""The examples that start a run in several processes; what cannot run here is read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from together import free_port

LAUNCHERS = Path(__file__).parent.parent / "examples/launchers"


def start(*words: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=400, env=dict(os.environ)
    )


def check_run(run: Path, ended: subprocess.CompletedProcess[str]) -> None:
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads((run / "run.json").read_text())
    assert (report["steps"], report["numerics"]["processes"]) == (2, 2)


@pytest.mark.slow
def test_accelerate_starts_it(base: Path, rejections: Path, tmp_path: Path) -> None:
    config = ["--config_file", LAUNCHERS / "accelerate.yaml", "--main_process_port", free_port()]
    launch = ["-m", "accelerate.commands.launch", *config]
    words = ["-m", "buleyean_rl", "train", rejections, "--model", base, "-o", tmp_path / "run", "--max-steps", 2]
    check_run(tmp_path / "run", start(*launch, *words))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="no Ray here: pip install '.[ray]' in the clone")
def test_ray_starts_it(base: Path, rejections: Path, tmp_path: Path) -> None:
    words = [rejections, "--model", base, "-o", tmp_path / "run", "--workers", 2, "--max-steps", 2]
    check_run(tmp_path / "run", start(LAUNCHERS / "ray_train.py", *words))


def test_the_scripts_are_sound() -> None:
    for name in ("two_hosts.sh", "slurm.sbatch"):
        subprocess.run(["bash", "-n", LAUNCHERS / name], check=True)
    service, job = yaml.safe_load_all((LAUNCHERS / "kubernetes.yaml").read_text())
    pods = job["spec"]["template"]["spec"]
    assert pods["subdomain"] == service["metadata"]["name"] == job["metadata"]["name"]
    assert f"--nnodes {job['spec']['completions']} " in pods["containers"][0]["args"][0]
    assert f"--master-addr {job['metadata']['name']}-0.{pods['subdomain']} " in pods["containers"][0]["args"][0]
