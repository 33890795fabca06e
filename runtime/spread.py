"""Corpora over workers of Ray Data: files of texts in, a folder of parquet files out, every worker with the model.

    IN   a .txt, .jsonl or .parquet file, or a folder of one kind of them, where every worker can read it
    OUT  a new folder of parquet files: the columns of IN, in its order, and the model's behind them

OUT appears when it is whole. What was interrupted begins anew: `corpus.py`, on one machine, keeps what it has.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import errors
from ..compact import open_folder
from ..embedding import why_not
from ..errors import BadParameter, EngineError, FolderExists, ParedError
from .corpus import Options
from .texts import pyarrow

READERS = {".txt": "read_text", ".jsonl": "read_json", ".parquet": "read_parquet"}
EMBEDDED, GENERATED = 1024, 256
"""Rows of a batch: enough texts of like lengths to pack, and enough prompts to keep an engine's places taken."""


@dataclass(frozen=True)
class Spread:
    """From where to where, over how many workers. field: the key or column of the texts; `text` in a .txt file."""

    source: Path
    out: Path
    workers: int
    field: str = "text"
    progress: bool = True


def embed(spread: Spread, model: Mapping[str, Any], options: Options) -> int:
    """Put the column `embedding`, lists of one length, behind the texts. Returns how many there were.

    model: the arguments of Embedder. Raises BadParameter, FolderExists, and the error of a worker.
    """
    if options.precision in ("int8", "uint8"):
        raise BadParameter(f"{options.precision} needs the ranges of the whole corpus; leave --ray or --precision out")
    return _run(spread, Embeds, (spread.field, dict(model), options), EMBEDDED, model)


def generate(spread: Spread, model: Mapping[str, Any], params: Mapping[str, Any], as_chat: bool) -> int:
    """Put `answer`, `finish_reason` and `output_tokens` behind the prompts. Returns how many there were.

    model: the arguments of LLM. params: those of SamplingParams, over what the folder recommends. as_chat: a prompt is
    the turn of a user. Raises BadParameter, FolderExists, and the error of a worker.
    """
    return _run(spread, Generates, (spread.field, dict(model), dict(params), as_chat), GENERATED, model)


class Embeds:
    """A worker that embeds. Called with a table, it returns it with one column more."""

    def __init__(self, field: str, model: Mapping[str, Any], options: Options) -> None:
        from .embed import Embedder

        self.field, self.options, self.embedder = field, options, Embedder(**model)

    def __call__(self, table: Any) -> Any:
        arrow, options = pyarrow()[0], self.options
        vectors: Any = self.embedder.encode(
            _texts(table, self.field),
            options.prompt_name,
            options.prompt,
            normalize_embeddings=options.normalize,
            truncate_dim=options.dimensions,
            precision=options.precision,
        )
        column = arrow.FixedSizeListArray.from_arrays(arrow.array(vectors.reshape(-1)), vectors.shape[1])
        return _with(table, {"embedding": column})


class Generates:
    """A worker that generates. Called with a table, it returns it with three columns more."""

    def __init__(self, field: str, model: Mapping[str, Any], params: Mapping[str, Any], as_chat: bool) -> None:
        from .llm import LLM
        from .params import SamplingParams

        self.field, self.as_chat, self.llm = field, as_chat, LLM(**model)
        self.params = SamplingParams.from_dict(dict(params), self.llm.default_params)

    def __call__(self, table: Any) -> Any:
        arrow = pyarrow()[0]
        prompts: list[Any] = _texts(table, self.field)
        if self.as_chat:
            prompts = [self.llm.tokenizer.chat([{"role": "user", "content": prompt}]) for prompt in prompts]
        outputs = self.llm.generate(prompts, self.params)
        columns = {
            "answer": arrow.array([output.text for output in outputs], arrow.string()),
            "finish_reason": arrow.array([output.finish_reason for output in outputs], arrow.string()),
            "output_tokens": arrow.array([len(output.token_ids) for output in outputs], arrow.int32()),
        }
        return _with(table, columns)


def _texts(table: Any, field: str) -> list[str]:
    if field not in table.column_names:
        raise BadParameter(f"there is no {field!r} in the corpus; it has {', '.join(table.column_names)}")
    texts = table.column(field).to_pylist()
    for text in texts:
        if reason := why_not(text):
            raise BadParameter(f"a text of the corpus {reason}")
    return texts


def _with(table: Any, columns: Mapping[str, Any]) -> Any:
    taken = sorted(columns.keys() & set(table.column_names))
    if taken:
        raise BadParameter(f"the corpus has columns of the names that are made: {', '.join(taken)}; rename them")
    for name, column in columns.items():
        table = table.append_column(name, column)
    return table


def _run(spread: Spread, worker: type, arguments: tuple[Any, ...], rows: int, model: Mapping[str, Any]) -> int:
    """Let workers do it, into a folder beside OUT that then takes its name."""
    if spread.out.exists():
        raise FolderExists(f"{spread.out} is already there; choose another name, workers write a folder of their own")
    kind, files = _files(spread.source)
    with open_folder(model["path"]):  # a wrong one is told here, not by every worker
        ray = _ray()
    resources = _resources(ray.cluster_resources(), spread.workers, model["device"])
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = spread.progress
    more = {"drop_empty_lines": False} if kind == ".txt" else {}
    corpus = getattr(ray.data, READERS[kind])(files, **more)
    draft = spread.out.with_name(f"{spread.out.name}.{os.getpid()}.partial")
    draft.mkdir(parents=True)
    try:
        batches = corpus.repartition(target_num_rows_per_block=rows)  # else a file may be one worker's alone
        made = batches.map_batches(
            worker,
            fn_constructor_args=arguments,
            compute=ray.data.ActorPoolStrategy(size=spread.workers),
            batch_size=rows,
            batch_format="pyarrow",
            **resources,
        )
        made.write_parquet(str(draft))
        os.replace(draft, spread.out)
    except Exception as error:
        raise _ours(error) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    parquet = pyarrow()[1]
    return sum(parquet.read_metadata(file).num_rows for file in spread.out.glob("*.parquet"))


def _files(source: Path) -> tuple[str, list[str]]:
    """The kind of the texts, and their files in the order of their names. Raises BadParameter."""
    files = sorted(path for path in source.iterdir() if path.suffix in READERS) if source.is_dir() else [source]
    kinds = {path.suffix for path in files}
    if len(kinds) != 1 or not kinds <= READERS.keys() or not all(path.is_file() for path in files):
        raise BadParameter(f"{source} must be a file, or a folder of files, of one kind: {', '.join(READERS)}")
    return kinds.pop(), [str(path.resolve()) for path in files]


def _ray() -> Any:
    """Ray, connected to the cluster of RAY_ADDRESS, or with one of its own on this machine. Raises BadParameter."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise BadParameter(f"workers need {error.name}: pip install 'pared[ray]'") from error
    if not ray.is_initialized():
        ray.init(include_dashboard=False)
    return ray


def _resources(cluster: Mapping[str, float], workers: int, device: str | None) -> dict[str, Any]:
    """What a worker is given: a share of the CPUs, and a GPU where there are any. Raises BadParameter.

    One CPU is left, to which Ray can send what reads and writes; a worker's threads use it as well.
    """
    gpus = int(cluster.get("GPU", 0)) if device != "cpu" else 0
    places, name = (gpus, "GPUs") if gpus else (int(cluster["CPU"]), "CPUs")
    if not 1 <= workers <= places:
        raise BadParameter(f"{workers} workers do not fit: the cluster has {places} {name}, and each takes one")
    cpus = int(cluster["CPU"])
    held = (cpus - 1) // workers or (cpus - 1) / workers  # Ray takes fractions below 1 alone
    threads = {"env_vars": {"OMP_NUM_THREADS": str(max(1, cpus // workers))}}
    return {"num_cpus": held, "num_gpus": min(gpus, 1), "runtime_env": threads}


def _ours(error: Exception) -> ParedError:
    """The error of pared that a worker raised, of which Ray keeps the words alone; else an EngineError."""
    told = re.findall(r"^pared\.errors\.(\w+): (.+)$", str(error), re.MULTILINE)
    return getattr(errors, told[-1][0])(told[-1][1]) if told else EngineError(f"a worker failed: {error}")
