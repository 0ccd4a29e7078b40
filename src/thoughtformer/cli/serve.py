"""`thoughtformer serve`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from thoughtformer.cli.options import Extrapolate, Model, Threads, set_threads
from thoughtformer.cli.store import parse_size
from thoughtformer.errors import InputError

__all__ = ["serve"]

TOKEN_VARIABLE = "THOUGHTFORMER_TOKEN"


def serve(
    model: Model = "tiny-gpthf",
    store: Annotated[Path | None, typer.Option(help="Sentence store: known sentences needn't be read again.")] = None,
    sessions: Annotated[
        Path | None, typer.Option(help="Folder for idle sessions; without, they end with the server.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; others than loopback need a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.", min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name for clients; default: its folder's.")] = None,
    max_rows: Annotated[int, typer.Option(help="Requests written at once.", min=1)] = 32,
    max_cache_size: Annotated[
        str | None, typer.Option(help="Bytes that requests in work may hold, e.g. 4GiB; default: no limit.")
    ] = None,
    max_waiting: Annotated[int, typer.Option(help="Requests that wait; more get 429.", min=1)] = 256,
    max_prefill_tokens: Annotated[
        int, typer.Option(help="Prompt tokens read between two steps of the others.", min=16)
    ] = 4096,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens that one completion may ask for.", min=1)] = 4096,
    request_seconds: Annotated[float, typer.Option(help="A request that takes longer gets 504.", min=0.1)] = 600.0,
    max_body_size: Annotated[str, typer.Option(help="Of a request; more gets 413.")] = "8MiB",
    store_size: Annotated[str | None, typer.Option(help="Bytes that the store may use, e.g. 8GiB.")] = None,
    session_size: Annotated[str, typer.Option(help="Bytes that idle sessions may hold in memory.")] = "1GiB",
    idle_seconds: Annotated[float, typer.Option(help="Sessions idle for longer leave memory.", min=0)] = 300.0,
    compile: Annotated[bool, typer.Option("--compile", help="Compile steps of a single request.")] = False,
    allow_extrapolation: Extrapolate = False,
    threads: Threads = None,
) -> None:
    """Serve a model by OpenAI's API, with a page to try it at the root.

    A bearer token is taken from $THOUGHTFORMER_TOKEN.

    Example: thoughtformer serve --model runs/mine --store sentences --sessions sessions --port 8000
    """
    try:
        import uvicorn

        from thoughtformer.serve import ServeSettings, Service, create_app
    except ImportError as error:
        raise InputError(
            f"serving needs further packages ({error.name}): pip install 'thoughtformer[serve]'."
        ) from None
    from thoughtformer.engine import Limits, Scheduler, SentenceStore, Sessions
    from thoughtformer.models.loading import load

    token = os.environ.get(TOKEN_VARIABLE) or None
    if token is None and host not in ("127.0.0.1", "localhost", "::1"):
        raise InputError(
            f"--host {host} lets other machines in: set {TOKEN_VARIABLE} to a bearer token that they must send, or "
            "listen at 127.0.0.1."
        )
    body_bytes, session_bytes = parse_size(max_body_size, "--max-body-size"), parse_size(session_size, "--session-size")
    assert body_bytes is not None
    assert session_bytes is not None
    limits = Limits(
        max_rows=max_rows,
        max_bytes=parse_size(max_cache_size, "--max-cache-size"),
        max_waiting=max_waiting,
        max_prefill_tokens=max_prefill_tokens,
    )
    settings = ServeSettings(
        model_name=name or Path(model).resolve().name,
        token=token,
        max_body_bytes=body_bytes,
        max_new_tokens=max_new_tokens,
        request_seconds=request_seconds,
        allowed_hosts=("127.0.0.1", "localhost") if token is None and host != "::1" else (),
    )
    set_threads(threads)
    loaded, tokenizer = load(model)
    loaded.config.allow_extrapolation = allow_extrapolation
    opened = (
        None
        if store is None
        else SentenceStore(store, max_bytes=parse_size(store_size, "--store-size"), busy_seconds=1.0)
    )
    try:
        scheduler = Scheduler(
            loaded,
            tokenizer,
            limits,
            sentences=None if opened is None else opened.of(loaded, is_strict=False),
            compile=compile,
        )
        kept = Sessions(scheduler.reader, folder=sessions, max_bytes=session_bytes, idle_seconds=idle_seconds)
        app = create_app(Service(scheduler, kept, settings))
        uvicorn.run(app, host=host, port=port, log_level="info", server_header=False, timeout_graceful_shutdown=5)
    finally:
        if opened is not None:
            opened.close()
