"""The proofs and the Python: the checker refuses what is no proof, and Lean and Python compute the same function.

The tests that run Lean are part of `make prove`, which sets `BULEYEAN_PROVE`; elsewhere they are skipped.
"""

import importlib.util
import os
import random
import re
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from buleyean_rl.objectives.complement import Prior, exact_target, ratios, target

FORMAL = Path(__file__).resolve().parent.parent / "formal"
SOURCES = sorted((FORMAL / "Buleyean").glob("*.lean"))

spec = importlib.util.spec_from_file_location("prove", FORMAL / "prove.py")
assert spec is not None
assert spec.loader is not None
prove = importlib.util.module_from_spec(spec)
sys.modules["prove"] = prove
spec.loader.exec_module(prove)

needs_lean = pytest.mark.skipif("BULEYEAN_PROVE" not in os.environ, reason="needs Lean: run `make prove`")


@pytest.fixture(scope="module")
def lean():
    lean = prove.find_lean()
    assert lean is not None, "make prove sets up Lean before it runs these tests"
    return lean


# ---- the checker


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_the_sources_hold_no_forbidden_word(path):
    assert prove.problems(path.read_text()) == []


PLANTS = [
    "theorem planted : 1 = 2 := by sorry",
    "theorem planted : 1 = 2 := sorryAx _",
    "theorem planted : 1 = 2 := by admit",
    "axiom planted : 1 = 2",
    "theorem planted : 1 = 2 := by native_decide",
]


@pytest.mark.parametrize(
    ("path", "plant"),
    [*((path, PLANTS[0]) for path in SOURCES), *((SOURCES[0], plant) for plant in PLANTS[1:])],
    ids=lambda part: getattr(part, "stem", part),
)
def test_a_plant_in_any_file_is_refused_before_lean_runs(path, plant):
    source = path.read_text().replace("\nend Buleyean", f"\n{plant}\n\nend Buleyean")
    assert plant in source
    never_run = prove.Lean(("no-such-command",), {})
    with pytest.raises(prove.ProofError, match=f"{path.stem}.lean: forbidden"):
        prove.check(never_run, path.stem, source)


@pytest.mark.parametrize("path", [*SOURCES, FORMAL / "bridge.lean"], ids=lambda path: path.stem)
def test_a_plant_in_any_file_makes_the_command_fail(path, tmp_path):
    copy = shutil.copytree(FORMAL, tmp_path / "formal")
    with (copy / path.relative_to(FORMAL)).open("a") as file:
        file.write("\ntheorem planted : 1 = 2 := by sorry\n")
    done = subprocess.run([sys.executable, copy / "prove.py"], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"NOT PROVED: {path.stem}.lean: forbidden" in done.stderr


def test_every_module_is_checked_and_in_an_order_that_imports_can_follow():
    assert {path.stem for path in SOURCES} == set(prove.MODULES)
    for place, name in enumerate(prove.MODULES):
        text = (FORMAL / "Buleyean" / f"{name}.lean").read_text()
        imported = {line.rsplit(".", 1)[1] for line in text.splitlines() if line.startswith("public import")}
        assert imported <= set(prove.MODULES[:place])


def test_theorems_are_read_with_their_comments():
    source = "/-- Says\nthis. -/\ntheorem a : True := trivial\n\ntheorem b (n : Nat) :\n    True := trivial\n"
    assert prove.theorems(source) == [prove.Theorem("a", "Says this."), prove.Theorem("b", "")]


def test_messages_are_told_from_the_notes_of_the_build():
    output = '[DEBUG:A] x\n{"severity": "error", "pos": {"line": 3, "column": 0}, "data": "no"}\n{"other": 1}\n'
    assert list(prove.messages(output)) == [prove.Message("error", 3, "no")]


def test_every_theorem_that_the_theory_page_names_exists():
    stated = {t.name for path in SOURCES for t in prove.theorems(path.read_text())}
    page = (FORMAL.parent / "docs" / "theory.md").read_text()
    last_cells = [line.split("|")[-2] for line in page.splitlines() if line.startswith("|")]
    named = {name for cell in last_cells for name in re.findall("`(.+?)`", cell)}
    assert len(named) > 30
    assert named <= stated


@needs_lean
def test_lean_itself_complains_of_a_hole_a_false_claim_and_an_unknown_name(lean):
    source = "theorem hole : 1 = 2 := by sorry\n\ntheorem wrong : 1 = 2 := rfl\n\n#check @Buleyean.missing\n"
    reported = {(m.line, m.severity) for m in prove.elaborate(lean, "Planted", source)}
    assert {(1, "warning"), (3, "error"), (5, "error")} <= reported


# ---- the bridge


def random_cases(count: int) -> list[prove.Case]:
    """One T or own rounds, counts beyond the clip, every kind of base measure and of prior."""
    dice = random.Random(20)
    cases = []
    for _ in range(count):
        options = dice.randint(1, 16)
        sizes = [1, 2, 10, 60, 10**6]
        rounds = dice.choice([[dice.choice(sizes)] * options, *2 * [dice.choices([*8 * [0], *sizes], k=options)]])
        counts = [dice.choice([0, dice.randint(0, n), n, 2 * n + 1]) for n in rounds]
        base = [
            [Fraction(1)] * options,
            [Fraction(dice.randint(1, 1000)) for _ in range(options)],
            [Fraction(dice.randint(1, 99), dice.randint(1, 99)) for _ in range(options)],
        ]
        m = dice.choice([Fraction(1), Fraction(dice.randint(1, 20), 20)])
        k = dice.choice([Fraction(1), Fraction(dice.randint(1, 20), dice.randint(1, 5))])
        between = Fraction(dice.randint(1, 1008), 1009)  # of a prime, so that no tie is left to rounding
        min_p = dice.choice([Fraction(0), Fraction(1), *3 * [between]])
        cases.append(prove.Case(m, k, min_p, rounds, counts, dice.choice(base)))
    return cases


def floats(values: list[Fraction]) -> torch.Tensor:
    return torch.tensor([float(x) for x in values], dtype=torch.float64)


@needs_lean
def test_lean_and_python_compute_the_same_function(lean):
    cases = random_cases(120)
    results = prove.evaluate(lean, cases)
    assert len(results) == len(cases)
    kept_tails = 0
    for case, values in zip(cases, results, strict=True):
        m, k, min_p, rounds, counts, base = case
        normalised = [mu / sum(base) for mu in base]
        v, n = torch.tensor(counts).double(), torch.tensor(rounds).double()
        for capped, to_all, to_plausible in (
            (False, values.target, values.plausible),
            (True, values.capped, values.capped_plausible),
        ):
            prior = Prior(m, k, capped)
            assert to_all == exact_target(counts, rounds, base, prior)
            assert to_plausible == exact_target(counts, rounds, base, prior, min_p)
            if set(base) == {1}:
                assert to_all == exact_target(counts, rounds, prior=prior)
            if len(set(rounds)) == 1:
                assert to_all == exact_target(counts, rounds[0], base, prior)
            if m == k == 1:
                assert to_all == exact_target(counts, rounds, base)
            kept_tails += to_plausible != to_all
            torch.testing.assert_close(target(v, n, floats(base), prior=prior), floats(to_all), rtol=1e-13, atol=0)
            got = target(v, n, floats(normalised), prior=prior, min_p=float(min_p))
            torch.testing.assert_close(got, floats(to_plausible), rtol=1e-13, atol=0)
        torch.testing.assert_close(ratios(v, n, prior=Prior(m, k)), floats(values.ratios), rtol=1e-14, atol=0)
    assert kept_tails > 40
