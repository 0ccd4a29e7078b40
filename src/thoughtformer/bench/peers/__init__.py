"""Other programs to measure beside: transformers in this process, others in environments of their own."""

from __future__ import annotations

from thoughtformer.bench.peers.environments import PEERS, find_peer, install_peer
from thoughtformer.bench.peers.process import PeerProcess

__all__ = ["PEERS", "PeerProcess", "find_peer", "install_peer"]
