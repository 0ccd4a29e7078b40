"""The HTTP API: OpenAI's completions and chats, sessions, health and metrics, and the page."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse

from thoughtformer.errors import ThoughtformerError, nearest
from thoughtformer.serve.answers import Shape, finish_reason, sse, usage
from thoughtformer.serve.errors import error_body, error_response, response_of
from thoughtformer.serve.limits import BearerToken, BodyLimit, KnownHosts, Unforeseen
from thoughtformer.serve.metrics import Metrics
from thoughtformer.serve.schemas import ChatRequest, CompletionRequest, GenerationRequest
from thoughtformer.serve.service import Generation, Service

__all__ = ["create_app"]

logger = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"
#: Responses beside 200, for the API's own description.
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in {
        400: "a value that can't be used",
        401: "no or a wrong bearer token",
        404: "no such model",
        409: "the session is busy, or unusable",
        413: "too large",
        429: "too many requests wait",
        500: "a fault of the server's",
        504: "not done in time",
        507: "no room on disk",
    }.items()
}


def create_app(service: Service) -> FastAPI:
    """The application; starts the service with it, and stops it at the end."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        saving = asyncio.create_task(service.save_idle())
        try:
            yield
        finally:
            saving.cancel()
            await asyncio.to_thread(service.stop)

    app = FastAPI(title="Thoughtformer", lifespan=lifespan, docs_url=None, redoc_url=None)
    metrics = Metrics(service)
    settings = service.settings
    # The last one added looks first.
    app.add_middleware(Unforeseen)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    if settings.token is not None:
        app.add_middleware(BearerToken, token=settings.token)
    if settings.allowed_hosts:
        app.add_middleware(KnownHosts, hosts=settings.allowed_hosts)
    if settings.cors_origins:
        # Before the token, which browsers don't send with what they ask beforehand.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    _tell_errors(app)
    model = {"id": settings.model_name, "object": "model", "created": service.created, "owned_by": "thoughtformer"}

    @app.get("/health")
    async def health() -> Response:
        """Whether requests are worked on."""
        if service.worker.is_alive:
            return JSONResponse({"status": "ok"})
        return error_response("the engine has stopped; see the server's log.", status=503)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        """For Prometheus."""
        text = await asyncio.to_thread(metrics.text)  # it waits for locks
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models", responses=ERRORS)
    async def models() -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}", responses=ERRORS)
    async def one_model(name: str) -> Response:
        """The model of that name."""
        return JSONResponse(model) if name == settings.model_name else _unknown_model(name, settings.model_name)

    @app.post("/v1/completions", responses=ERRORS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Text that goes on from prompts."""
        return await answer(body, request, is_chat=False)

    @app.post("/v1/chat/completions", responses=ERRORS)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """The next message of a conversation."""
        return await answer(body, request, is_chat=True)

    @app.delete("/v1/sessions/{name:path}", responses=ERRORS)
    async def delete_session(name: Annotated[str, PathParameter(max_length=512)]) -> Response:
        """Forgets a session, in memory and on disk."""
        if await service.saving(lambda: service.sessions.delete(name)):
            return JSONResponse({"id": name, "object": "session", "deleted": True})
        return error_response(f"there is no session {name!r}.", status=404, code="session_not_found")

    async def answer(body: GenerationRequest, request: Request, *, is_chat: bool) -> Response:
        if body.model != settings.model_name:
            return _unknown_model(body.model, settings.model_name)
        peer = request.client.host if request.client is not None else ""
        generation = await service.begin(body, client=f"{peer} {body.user}" if isinstance(body.user, str) else peer)
        shape = Shape(
            identity=f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}",
            created=int(time.time()),
            model=settings.model_name,
            is_chat=is_chat,
            counts=_counts(body),
        )
        if body.stream:
            events = _streamed(generation, shape, body, metrics)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        try:
            ended = await _all_ended(generation, request)
            if not ended:
                return Response(status_code=499)  # nobody is there to read it
            failed = _failure(generation)
            if failed is not None:
                return failed
            done = generation.completions()
            _observe(metrics, generation)
            return JSONResponse(shape.whole(done, body.number_of_choices))
        finally:
            await generation.close()

    for path, file in (("/", "page.html"), ("/page.css", "page.css"), ("/page.js", "page.js")):
        app.add_api_route(path, _file(PAGE / file), methods=["GET"], include_in_schema=False)
    return app


def _file(path: Path) -> Any:
    async def show() -> FileResponse:
        return FileResponse(path, headers={"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"})

    return show


async def _all_ended(generation: Generation, request: Request) -> bool:
    """Waits for all of its requests; False if the client goes away before."""

    async def finish() -> None:
        async for _ in generation.events():
            pass

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(finish()), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            tasks[0].result()
            return True
        return False
    finally:
        for task in tasks:
            task.cancel()


async def _streamed(
    generation: Generation, shape: Shape, body: GenerationRequest, metrics: Metrics
) -> AsyncIterator[bytes]:
    """Server-sent events, as text comes; a failure is told by a last one."""
    try:
        if shape.is_chat:
            for index in range(len(generation.requests)):
                yield sse(shape.first(index))
        if body.return_context:
            for index, one in enumerate(generation.requests):
                parts = await generation.service.prepared(partial(generation.service.parts_of, one))
                yield sse(shape.chunk(index, "", None, context=parts))
        async for index, event in generation.events():
            if event.finish_reason in ("cancelled", "deadline", "error"):
                message, status, code = _told(generation)
                yield sse(error_body(message, status=status, code=code))
                return
            if event.text or event.finish_reason is not None or body.return_context:
                more = {}
                if event.context is not None:
                    end = generation.service.runner.sentence_end
                    ends = end is not None and event.token == end
                    more = {"context": {"closes_sentence": ends, **asdict(event.context)}}
                yield sse(shape.chunk(index, event.text, finish_reason(event.finish_reason), **more))
        _observe(metrics, generation)
        if _counts(body):
            yield sse(shape.last(usage(generation.completions(), body.number_of_choices)))
        yield sse("[DONE]")
    except Exception:  # the answer has begun: its status can't say so any more
        logger.exception("a stream failed")
        yield sse(error_body("the server failed on this request; see its log.", status=500, code="internal_error"))
    finally:
        await generation.close()


def _counts(body: GenerationRequest) -> bool:
    """Whether a stream is to end with token counts."""
    return bool(body.stream) and body.stream_options is not None and body.stream_options.include_usage


def _observe(metrics: Metrics, generation: Generation) -> None:
    for one in generation.requests:
        metrics.first_token.observe(one.first_token_seconds)
        metrics.whole.observe(one.seconds)


def _failure(generation: Generation) -> Response | None:
    if all(one.has_ended_itself for one in generation.requests):
        return None
    message, status, code = _told(generation)
    return error_response(message, status=status, code=code)


def _told(generation: Generation) -> tuple[str, int, str]:
    """What to say of a request that didn't end by itself."""
    reasons = [one.finish_reason for one in generation.requests]
    if "deadline" in reasons:
        seconds = generation.service.settings.request_seconds
        return f"the request took longer than {seconds:g} seconds: ask for fewer tokens.", 504, "deadline"
    if "error" in reasons:
        failed = next((one.error for one in generation.requests if one.error is not None), None)
        logger.error("the engine failed", exc_info=failed)
        return "the engine failed on this request; see the server's log.", 500, "engine_error"
    return "the server is stopping.", 503, "stopping"


def _unknown_model(name: str, known: str) -> Response:
    return error_response(
        f"the model {name!r} does not exist; this server has {known!r}.",
        status=404,
        code="model_not_found",
        param="model",
    )


def _tell_errors(app: FastAPI) -> None:
    """All errors in one shape, wherever they come from."""

    @app.exception_handler(ThoughtformerError)
    async def ours(request: Request, error: ThoughtformerError) -> Response:
        return response_of(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        message, param = _first_mistake(error.errors())
        return error_response(message, status=400, code="invalid_value", param=param)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return error_response(str(error.detail), status=error.status_code, headers=error.headers)


def _first_mistake(mistakes: Sequence[Any]) -> tuple[str, str | None]:
    """The first of pydantic's errors in a line, and which key it is about."""
    first = mistakes[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return f"the body is no JSON: {first.get('ctx', {}).get('error', first['msg'])}.", None
    if not place and first["type"] != "value_error":
        return "the body must be a JSON object, sent with `Content-Type: application/json`.", None
    if first["type"] == "extra_forbidden" and len(place) == 1:
        known = {*CompletionRequest.model_fields, *ChatRequest.model_fields}
        return f"{place[0]!r} is no parameter here.{nearest(place[0], known)}", place[0]
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] != "value_error" and not isinstance(first.get("input"), dict | list):
        message += f", and not {repr(first.get('input'))[:80]}"
    return (f"{'.'.join(place)}: {message}.", place[0]) if place else (f"{message}.", None)
