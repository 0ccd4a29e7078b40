"""What generation holds: keys and values of open and closed sentences, with byte accounting."""

from __future__ import annotations

from thoughtformer.cache.gpthf import GPTHFCache
from thoughtformer.cache.rows import distinct_storage_bytes
from thoughtformer.cache.stage import StageCache

__all__ = ["GPTHFCache", "StageCache", "distinct_storage_bytes"]
