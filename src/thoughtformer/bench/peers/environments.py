"""Virtual environments of the peers whose versions clash with this package's, or that have to be compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import torch

from thoughtformer.errors import ConfigError, OutputError, nearest

__all__ = ["PEERS", "Peer", "find_peer", "install_peer", "peers_folder"]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A program of its own environment.

    Attributes:
        requirements: what pip installs, in groups, one after the other.
        module: what must be importable there.
        worker: the file beside this one that runs there.
        note: what installing takes.
    """

    name: str
    requirements: tuple[tuple[str, ...], ...]
    module: str
    worker: str
    note: str


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            name="llama-cpp",
            requirements=(("llama-cpp-python==0.3.36", "numpy"),),
            module="llama_cpp",
            worker="llama_cpp_worker.py",
            note="compiles llama.cpp: minutes, and a C++ compiler with cmake",
        ),
        Peer(
            name="kvpress",
            # The torch that runs here, so that pip takes the same build; kvpress needs an older transformers.
            requirements=((f"torch=={torch.__version__.partition('+')[0]}",), ("kvpress==0.5.5",)),
            module="kvpress",
            worker="kvpress_worker.py",
            note="a second torch and transformers: about 1.5 GB",
        ),
    )
}


def peers_folder() -> Path:
    """Where the environments are: $THOUGHTFORMER_PEERS, or a folder of the user's cache."""
    named = os.environ.get("THOUGHTFORMER_PEERS")
    return Path(named) if named else Path.home() / ".cache" / "thoughtformer" / "peers"


def _peer(name: str) -> Peer:
    if name not in PEERS:
        raise ConfigError(f"peer {name!r} is unknown.{nearest(name, PEERS)}")
    return PEERS[name]


def _python(name: str) -> Path:
    return peers_folder() / name / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def find_peer(name: str) -> Path | None:
    """The peer's Python, if its environment is there and whole."""
    peer, python = _peer(name), _python(name)
    if not python.exists():
        return None
    done = subprocess.run([str(python), "-c", f"import {peer.module}"], capture_output=True, check=False)
    return python if done.returncode == 0 else None


def install_peer(name: str) -> Path:
    """Makes the peer's environment, if it isn't there; returns its Python.

    Raises:
        OutputError: pip failed; its last words are in the message.
    """
    peer = _peer(name)
    found = find_peer(name)
    if found is not None:
        return found
    folder, python = peers_folder() / name, _python(name)
    try:
        venv.create(folder, with_pip=True, clear=True)
        for requirements in peer.requirements:
            subprocess.run(
                [str(python), "-m", "pip", "install", "--quiet", *requirements],
                check=True,
                text=True,
                stdout=sys.stderr,
                stderr=subprocess.PIPE,
            )
    except OSError as error:
        raise OutputError(f"can't make {folder}: {error}") from None
    except subprocess.CalledProcessError as error:
        last = json.dumps((error.stderr or "").strip().splitlines()[-3:])
        raise OutputError(f"pip couldn't install {name} into {folder}: {last}") from None
    return python
