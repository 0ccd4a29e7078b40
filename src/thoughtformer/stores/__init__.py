"""What is kept of texts on disk: vectors of sentences, and what sessions hold."""

from __future__ import annotations
