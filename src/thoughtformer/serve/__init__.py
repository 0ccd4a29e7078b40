"""An OpenAI-compatible HTTP server, and a page to try it. Knows requests and text; tensors stay in the engine."""

from __future__ import annotations

from thoughtformer.serve.app import create_app
from thoughtformer.serve.service import ServeSettings, Service

__all__ = ["ServeSettings", "Service", "create_app"]
