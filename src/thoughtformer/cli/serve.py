"""`thoughtformer serve`."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from thoughtformer.cli.opening import Compression, open_model, takes_compression
from thoughtformer.cli.options import Drafts, Extrapolate, Threads, check_model, set_threads
from thoughtformer.cli.store import parse_size
from thoughtformer.errors import InputError

__all__ = ["serve"]

TOKEN_VARIABLE = "THOUGHTFORMER_TOKEN"


@takes_compression
def serve(
    *,
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help="tiny-gpthf, tiny-gpt, or a folder with one or a causal LM.", callback=check_model
        ),
    ] = "tiny-gpthf",
    store: Annotated[Path | None, typer.Option(help="Sentence store: known sentences needn't be read again.")] = None,
    session_folder: Annotated[
        Path | None, typer.Option("--sessions", help="Folder for idle sessions; without, they end with the server.")
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
    max_prompt_tokens: Annotated[
        int | None,
        typer.Option(
            help="Of a prompt; longer ones get 413. Default: as many as the model takes; 131,072 if it has no limit.",
            min=1,
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens that one completion may ask for.", min=1)] = 4096,
    default_new_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of a chat that doesn't say; default: as many as there is room for.", min=1),
    ] = None,
    request_seconds: Annotated[float, typer.Option(help="A request that takes longer gets 504.", min=0.1)] = 600.0,
    max_body_size: Annotated[str, typer.Option(help="Of a request; more gets 413.")] = "8MiB",
    store_size: Annotated[str | None, typer.Option(help="Bytes that the store may use, e.g. 8GiB.")] = None,
    session_size: Annotated[str, typer.Option(help="Bytes that idle sessions may hold in memory.")] = "1GiB",
    idle_seconds: Annotated[float, typer.Option(help="Sessions idle for longer leave memory.", min=0)] = 300.0,
    cors_origins: Annotated[
        list[str] | None,
        typer.Option(
            "--cors-origin",
            help="Pages of this origin may call the server, e.g. https://chat.example.org; * for any; repeatable.",
        ),
    ] = None,
    drafts: Drafts = "off",
    compile: Annotated[bool, typer.Option("--compile", help="Compile steps of a single request.")] = False,
    allow_extrapolation: Extrapolate = False,
    threads: Threads = None,
    compression: Compression,
) -> None:
    """Serve a model by OpenAI's API, with a page to try it at the root.

    A bearer token is taken from $THOUGHTFORMER_TOKEN.

    Example: thoughtformer serve --model runs/mine --store sentences --sessions sessions --port 8000

    Example: thoughtformer serve --model tiny-gpt --adapter tiny-gpt-sentinel --removed 0.8

    Example: thoughtformer serve --model my-llama --method streaming --max-entries 1024
    """
    try:
        import uvicorn

        from thoughtformer.serve import ServeSettings, Service, create_app
    except ImportError as error:
        raise InputError(
            f"serving needs further packages ({error.name}): pip install 'thoughtformer[serve]'."
        ) from None
    from thoughtformer.decode import StepCosts, drafters_of
    from thoughtformer.engine import Limits, Scheduler, SentenceStore, Sessions, runner_of
    from thoughtformer.stores.sentences import storable

    token = os.environ.get(TOKEN_VARIABLE) or None
    if token is None and host not in ("127.0.0.1", "localhost", "::1"):
        raise InputError(
            f"--host {host} lets other machines in: set {TOKEN_VARIABLE} to a bearer token that they must send, or "
            "listen at 127.0.0.1."
        )
    asked = compression.on()
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
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        default_new_tokens=default_new_tokens,
        request_seconds=request_seconds,
        allowed_hosts=("127.0.0.1", "localhost") if token is None and host != "::1" else (),
        cors_origins=tuple(_origin(origin) for origin in cors_origins or ()),
    )
    set_threads(threads)
    _check_free(host, port)  # before the model is read
    served, tokenizer = open_model(model, asked, allow_extrapolation=allow_extrapolation)
    with ExitStack() as stack:
        known = None
        if store is not None:
            storable(served)
            opened = SentenceStore(store, max_bytes=parse_size(store_size, "--store-size"), busy_seconds=1.0)
            stack.callback(opened.close)
            known = opened.of(served, is_strict=False)
        runner = runner_of(served, tokenizer, sentences=known, compile=compile)
        scheduler = Scheduler(runner, limits, drafters=drafters_of(drafts), costs=StepCosts())
        kept = Sessions(scheduler.runner, folder=session_folder, max_bytes=session_bytes, idle_seconds=idle_seconds)
        app = create_app(Service(scheduler, kept, settings))
        uvicorn.run(app, host=host, port=port, log_level="info", server_header=False, timeout_graceful_shutdown=5)


def _origin(given: str) -> str:
    """An origin as browsers write it.

    Raises:
        InputError: something else, which no browser would ever send.
    """
    if given in ("*", "null"):
        return given
    parts = urlsplit(given)
    if not parts.scheme or not parts.netloc or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise InputError(
            f"--cors-origin {given!r} is no origin: give scheme and host, as in https://chat.example.org, or *."
        )
    return f"{parts.scheme}://{parts.netloc}".lower()


def _check_free(host: str, port: int) -> None:
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise InputError(
            f"can't listen at {host}, port {port} ({error.strerror or error}): choose another --host or --port."
        ) from None
