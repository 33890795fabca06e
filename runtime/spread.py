"""Corpora over the workers of Ray Data: files of texts in, a folder of parquet files out, every worker with the model.

    IN  a .txt, .jsonl or .parquet file, or a folder of one kind of them, where every worker can read it
    OUT a folder of parquet files: the columns of IN, in its order, with the model's behind them

OUT appears when it is whole. What was interrupted begins anew: for one machine runtime/corpus.py keeps what it has.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..durable import disk_errors
from ..embedding import why_not
from ..errors import BadParameter, EngineError, FolderExists, ParedError
from .corpus import Options
from .texts import pyarrow

KINDS = (".txt", ".jsonl", ".parquet")
EMBEDS, GENERATES = 1024, 256
"""Rows of a batch: enough for an encoder to pack texts of one length, and for an engine to keep its places taken."""
