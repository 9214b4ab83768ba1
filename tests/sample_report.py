"""What a finished run says of itself, for tests of what reads it."""

from buleyean_rl.system.host import library_versions
from buleyean_rl.training.report import RunReport

CONFIG = {"alpha": 0.7, "tau": 1.0, "lora_rank": 16, "lora_alpha": 32, "lora_dropout": 0.05}
REPORT = RunReport(
    model="org/base",
    objective="complement",
    records=4500,
    records_held_out=500,
    records_sha256="ab" * 32,
    steps=1125,
    tokens=900_000,
    loss_start=0.9,
    loss_final=0.5,
    loss_floor=0.48,
    optimality_gap=0.02,
    optimality_gap_relative=0.02 / 0.42,
    loss_training=0.51,
    rejected_nll_base=1.25,
    rejected_nll_final=2.5,
    drift={
        "own": {"kl": 0.012, "entropy_base": 3.5, "entropy": 3.55, "nll_base": 3.5, "nll": 3.52},
        "bundled": {"kl": 0.01, "entropy_base": 3.2, "entropy": 3.25, "nll_base": 3.0, "nll": 3.01},
    },
    seconds=1800.0,
    tokens_per_second=500.0,
    peak_rss_bytes=10**9,
    compute="bf16, AVX2 kernels, fused decoder, packed sequences, 2 threads",
    device="cpu, 2 threads",
    parameters={"base": 134_515_008, "adapter": 4_884_480},
    data={"read": 5000, "dropped": 0, "truncated_responses": 3},
    versions=library_versions(),
    config=CONFIG,
)
