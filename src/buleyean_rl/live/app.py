"""The application: the OpenAI API, and what is said to the server itself under `/buleyean`."""

from __future__ import annotations

import json
import sqlite3
import sys
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from buleyean_rl.errors import BuleyeanError, RecordError, UsageError
from buleyean_rl.live.completions import CompletionStore, UnknownCompletion
from buleyean_rl.live.proxy import Relay, refusal, refuse
from buleyean_rl.live.serving import Busy, Serving
from buleyean_rl.live.target import TargetQuery, find_target
from buleyean_rl.live.transcript import Transcript
from buleyean_rl.system.wording import one_line
from buleyean_rl.web.access import AccessControl
from buleyean_rl.web.body import read_object

MAX_BODY = 4 << 20  # bytes: a conversation that fills a large context
MAX_REQUESTS = 256  # under way and waiting
MAX_REASON = 2_000  # characters
WITH_TOOLS = ("tools", "functions")  # their part of the prompt is in no record
NOT_FORWARDED = ("lora", "id_slot", "verbose")  # fields that are not a client's to choose


def make_app(
    serving: Serving, *, token: str | None, hosts: frozenset[str] | None, completions: CompletionStore | None = None
) -> Any:
    """The application, guarded.

    Args:
        serving: who answers.
        token: must be shown; None for nobody but this machine.
        hosts: names under which the server may be asked for; None for any.
        completions: keeps completions for feedback; None for no feedback.
    """
    app = Starlette(
        routes=[
            Route("/health", _health),
            *(Route(f"{prefix}/models", _models) for prefix in ("", "/v1")),
            *(
                Route(f"{prefix}/{name}", _complete, methods=["POST"])
                for prefix in ("", "/v1")
                for name in ("chat/completions", "completions")
            ),
            Route("/buleyean", _state),
            Route("/buleyean/swap", _swap, methods=["POST"]),
            Route("/buleyean/feedback", _feedback, methods=["POST"]),
        ],
        exception_handlers={HTTPException: _refuse}
        | dict.fromkeys((BuleyeanError, ClientDisconnect, OSError, sqlite3.Error), _say),
    )
    app.router.redirect_slashes = False
    app.state.serving, app.state.completions = serving, completions
    return AccessControl(app, token=token, hosts=hosts, guards=_is_guarded, explain=refusal, on_shutdown=lambda: None)


def _is_guarded(path: str) -> bool:
    return path != "/health"


async def _health(request: Request) -> Response:
    serving = _serving(request)
    return JSONResponse({"status": "error" if serving.failed.done() else "ok"}, 500 if serving.failed.done() else 200)


async def _models(request: Request) -> Response:
    serving = _serving(request)
    names = {serving.name: serving.target.name} | ({serving.base_name: "base"} if serving.is_trained else {})
    rows = [
        {"id": name, "object": "model", "created": 0, "owned_by": "buleyean", "run": run} for name, run in names.items()
    ]
    return JSONResponse({"object": "list", "data": rows})


async def _complete(request: Request) -> Response | Relay:
    serving, body = _serving(request), await _read(request)
    name = body.get("model")
    choice = serving.choose(name) if name is None or isinstance(name, str) else None
    if choice is None:
        return refuse(404, f"there is no model {name!r:.200}: there are {serving.name} and {serving.base_name}")
    if serving.requests >= MAX_REQUESTS:
        return refuse(429, f"{MAX_REQUESTS} requests are waiting already: try again later", {"Retry-After": "5"})
    path = f"v1{request.url.path.removeprefix('/v1')}"
    forwarded = {name: value for name, value in body.items() if name not in NOT_FORWARDED} | dict(choice.fields)
    completions: CompletionStore | None = request.app.state.completions
    if completions is None or not path.endswith("chat/completions") or any(map(body.get, WITH_TOOLS)):
        return Relay(choice, path, forwarded)
    transcript = Transcript(body)

    async def remember() -> None:
        if (completion := transcript.completion()) is not None:
            target, is_base = choice.engine.target, choice.model == serving.base_name
            try:
                await run_in_threadpool(completions.add, completion, target, is_base=is_base)
            except (OSError, sqlite3.Error) as error:  # the client has its reply
                print(f"{completion.id} is not remembered: {error}", file=sys.stderr)

    return Relay(choice, path, forwarded | transcript.fields, transcript.read, remember)


async def _feedback(request: Request) -> Response:
    completions, body = request.app.state.completions, await _read(request)
    if completions is None:
        return refuse(404, "completions are not remembered: start the server with --remember FOLDER")
    identity, reason = body.get("completion_id"), body.get("reason", "")
    spans = body.get("spans", [])
    rejected = body.get("rejected", True)
    if not isinstance(identity, str) or not isinstance(spans, list) or type(rejected) is not bool:
        return refuse(400, 'give {"completion_id": TEXT}, and "rejected": true or false, or "spans": [[start, end]]')
    if not isinstance(reason, str) or len(reason) > MAX_REASON:
        return refuse(400, f"reason must be a text of at most {MAX_REASON:,} characters")
    verdict = {"rejected": rejected, "spans": spans, "reason": one_line(reason)}
    return JSONResponse({"judged": await run_in_threadpool(completions.judge, identity, verdict)})


async def _state(request: Request) -> Response:
    return JSONResponse(_describe(_serving(request)))


async def _swap(request: Request) -> Response:
    serving, body = _serving(request), await _read(request)
    match body:
        case {"rollback": True}:
            await serving.roll_back()
            measured = None
        case {"run": str(name)} if name:
            query = TargetQuery(name, base=serving.base.gguf, tokenizer=serving.target.tokenizer is not None)
            measured = await serving.swap(await find_target(query))
        case _:
            return refuse(400, 'say what to swap in: {"run": PATH}, or {"rollback": true}')
    return JSONResponse(_describe(serving) | {"gate": measured})


def _describe(serving: Serving) -> dict[str, Any]:
    """What answers now."""
    return {"run": serving.target.name, "models": [serving.name, serving.base_name]}


async def _read(request: Request) -> dict[str, Any]:
    """A request's body; what its client cut inside an emoji is a question mark, as no engine and no file takes it."""
    body = await read_object(request, MAX_BODY)
    try:
        text = json.dumps(body, ensure_ascii=False)
        text.encode()
    except RecursionError:
        raise HTTPException(400, "nested too deeply") from None
    except UnicodeEncodeError:
        body = json.loads(text.encode(errors="replace"))
    return body


def _serving(request: Request) -> Serving:
    serving: Serving = request.app.state.serving
    return serving


async def _refuse(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return refuse(error.status_code, error.detail, error.headers)


async def _say(_request: Request, error: Exception) -> Response:
    statuses = {Busy: 409, UnknownCompletion: 404, UsageError: 400, RecordError: 400, OSError: 500, sqlite3.Error: 500}
    return refuse(next((status for kind, status in statuses.items() if isinstance(error, kind)), 422), str(error))
