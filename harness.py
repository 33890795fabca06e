"""Multiple choice through lm-eval (the extra `eval`): tasks are its YAML files, the model behind them our decoder.

An answer's score is the log-probability of its tokens after the question; `acc` takes the largest, `acc_norm` the
largest for each character. Nothing is downloaded: a task brings its data by a function of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from .errors import BadParameter
from .evaluate import Questions, log_likelihoods
from .runtime.model import Decoder
from .runtime.text import Tokenizer

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager
except ImportError as missing:
    raise BadParameter(f"tasks are asked through lm-eval ({missing}); pip install 'pared[eval]'") from missing

METRICS = {"acc": "", "acc_norm": " norm"}


def multiple_choice(tasks: Sequence[str], folder: Path, limit: int | None = None, progress: bool = False) -> Questions:
    """What asks a model the first `limit` questions of each task in `folder`, all of them by default.

    Gives the accuracy under the task's name, and under "<task> norm" that of scores divided by characters.
    Raises BadParameter for a task that the folder lacks.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it advises on options of its own command line
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        raise BadParameter(f"no task is called {unknown[0]!r}; known are {', '.join(manager.all_tasks)}")

    def ask(decoder: Decoder, tokenizer: Tokenizer) -> dict[str, float]:
        model = _Model(decoder, tokenizer, progress)
        options = {"task_manager": manager, "limit": limit, "bootstrap_iters": 0, "log_samples": False}
        found = simple_evaluate(model=model, tasks=list(tasks), **options)["results"]
        return {
            f"{task}{name}": found[task][f"{metric},none"]
            for task in tasks
            for metric, name in METRICS.items()
            if f"{metric},none" in found[task]
        }

    return ask


class _Model(TemplateLM):
    """lm-eval's view of a decoder: it scores answers and generates none."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, progress: bool) -> None:
        super().__init__()
        self._decoder, self._tokens, self._progress = decoder, tokenizer, progress

    @property
    def eot_token_id(self) -> int:
        """What stands ahead of an answer without a question."""
        return self._tokens.eos or 0

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self._tokens.encode(string)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        scores = log_likelihoods(self._decoder, [(context, answer) for _, context, answer in requests])
        return list(tqdm(scores, "answers", len(requests), unit="answer", disable=not self._progress))

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> NoReturn:
        raise BadParameter("a task asks for the perplexity of texts; pared eval --text measures it")

    def generate_until(self, requests: Sequence[Any], **_: Any) -> NoReturn:
        raise BadParameter("a task asks for generated text; pared eval takes tasks of output_type multiple_choice")
