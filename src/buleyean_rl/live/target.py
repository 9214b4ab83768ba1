"""What is served: the files that an engine is given, found by the name of a run, a model or a GGUF file."""

from __future__ import annotations

import asyncio
import json
import os
from asyncio.subprocess import PIPE
from dataclasses import asdict, dataclass
from pathlib import Path

from buleyean_rl.errors import EngineError, UsageError
from buleyean_rl.inference.gguf_file import check_gguf
from buleyean_rl.system.module_process import module_command, module_environment

ADAPTER_TYPE = "adapter"  # in `general.type`


@dataclass(frozen=True)
class Target:
    """What an engine is given.

    Args:
        name: of the run or model, for people.
        base: of the base model, for people.
        gguf: path of a whole model.
        adapter: path of a LoRA GGUF for it; None for none.
        tokenizer: hash of its tokenizer, by which records name token ids; None where nobody asked.
    """

    name: str
    base: str
    gguf: str
    adapter: str | None = None
    tokenizer: str | None = None


@dataclass(frozen=True)
class TargetQuery:
    """What a user names.

    Args:
        name: a run folder, a model as for `train`, or a GGUF file.
        lora: an adapter GGUF for it; None for none.
        base: path of the GGUF that an adapter file goes with; None where a whole model is needed.
        tokenizer: find the tokenizer's hash, too.
    """

    name: str
    lora: str | None = None
    base: str | None = None
    tokenizer: bool = False


async def find_target(query: TargetQuery) -> Target:
    """The files of what a user names; those that are not there yet are made, in a process of their own.

    Raises:
        UsageError: an adapter without its model, or for one that has its adapter already.
        EngineError: there is no such model, or its files cannot be made.
    """
    is_file = Path(query.name).suffix == ".gguf" or os.path.isfile(query.name)  # False for what can be no path
    if is_file and not query.tokenizer:
        return await asyncio.to_thread(file_target, query)
    return await _prepare(query)


def file_target(query: TargetQuery) -> Target:
    """A GGUF file as a target.

    Raises:
        UsageError: it is an adapter, and there is no model that it goes with; or it goes with two.
        EngineError: it is damaged, or no GGUF.
    """
    path = Path(query.name).absolute()
    header = check_gguf(path, model=False)
    if header.metadata.get("general.type") != ADAPTER_TYPE:
        check_gguf(path)
        lora = None if query.lora is None else Path(query.lora).absolute()
        if lora is not None:
            check_gguf(lora, model=False)
        return Target(
            path.stem if lora is None else lora.stem, path.stem, str(path), None if lora is None else str(lora)
        )
    if query.base is None:
        raise UsageError(f"{path} is an adapter: name the model, and this with --lora")
    if query.lora is not None:
        raise UsageError(f"{path} is an adapter, and --lora names another: leave one out")
    return Target(path.stem, Path(query.base).stem, query.base, str(path))


async def _prepare(query: TargetQuery) -> Target:
    process = await asyncio.create_subprocess_exec(
        *module_command("buleyean_rl.live.prepare"),
        stdin=PIPE, stdout=PIPE, start_new_session=True, env=module_environment(),
    )  # fmt: skip
    try:
        output, _ = await process.communicate(json.dumps(asdict(query)).encode())
    except BaseException:
        process.kill()
        raise
    try:
        reply = json.loads(output)
    except ValueError:
        raise EngineError(f"{query.name}: its files could not be made: the process ended: see above") from None
    if "error" in reply:
        raise (UsageError if reply["usage"] else EngineError)(reply["error"])
    return Target(**reply)
