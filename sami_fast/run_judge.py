"""The judge that a run's configuration names: checked before the run, loaded when it is asked."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from sami_fast.comparison import JudgeTemplate, compare_files
from sami_fast.config import ModelConfig, load_model
from sami_fast.endpoint import Endpoint
from sami_fast.judge import EndpointJudge, Judge, LocalJudge, read_letters
from sami_fast.model_store import ModelStore, weights_digest
from sami_fast.run_config import JudgeConfig
from sami_fast.scoring import check_model

logger = logging.getLogger(__name__)

# Each line holds a key of the judge and the whole question, so the file outlives a change of the stage's inputs.
VERDICTS = "win_rate.verdicts.jsonl"


class RunJudge:
    """What a judge's verdicts depend on, and the judge itself.

    Args:
        config: with `model` or `endpoint`.
        models: of the run; a local judge takes their place in memory, and runs on the same device.

    Raises:
        ValueError: a wrong setting or template, no such model, or one whose tokenizer cannot tell the answers apart.
        EndpointError: the package openai or the endpoint's key is missing.
    """

    def __init__(self, config: JudgeConfig, models: ModelStore) -> None:
        self.config, self.models, self._remote = config, models, None
        if config.model is None:
            sampling = dict(max_tokens=config.answer_tokens, temperature=config.temperature)
            endpoint = Endpoint.from_config("judge.endpoint", config.endpoint)
            self._remote = EndpointJudge(endpoint, concurrency=config.concurrency, **sampling)
        else:
            try:
                models.positions(config.model)
                tokenizer = models.tokenizer(config.model)
            except (OSError, ValueError) as error:
                raise ValueError(f"judge.model: expected a causal LM, got {config.model!r}: {error}") from None
            try:
                read_letters(tokenizer)
            except ValueError as error:
                raise ValueError(f"judge.model: {config.model!r} cannot be asked: {error}") from None
        self.template = (self._remote or LocalJudge).template if config.template is None else config.template
        self._text = JudgeTemplate.load(self.template).text

    def inputs(self) -> dict[str, Any]:
        """What verdicts depend on. Where an endpoint is reached, timeouts and batch sizes are not among it."""
        if self._remote is not None:
            who = dict(self._remote.settings)
        else:
            who = {"kind": "local", "model": self.models.digest(self.config.model), "dtype": self.config.dtype}
        return {"judge": who, "template": self._text, "max_pairs": self.config.max_pairs}

    def compare(self, responses: Path, against: Path, folder: Path) -> dict[str, Any]:
        """Write win_rate.json and `VERDICTS` to a stage's folder; verdicts that are there are not asked for again.

        Raises:
            As `compare_files`.
        """
        options = dict(template=self.template, limit=self.config.max_pairs, progress=sys.stderr.isatty())
        result = compare_files(responses, against, self._judge(), folder / "win_rate.json", **options)
        logger.info("%s: win rate %.3f, by %s", folder, result["win_rate"]["mean"], result["judge"]["judge"])
        return {name: result[name] for name in ("pairs", "questions", "unreadable")}

    def _judge(self) -> Judge:
        """A local one is loaded, and no model of the run stays in memory."""
        if self._remote is not None:
            return self._remote
        self.models.drop()
        name, device = self.models.path(self.config.model), self.models.config.device
        model, tokenizer = load_model(ModelConfig(name, self.config.dtype, device))
        check_model(model)
        weights = weights_digest(self.models.digest(self.config.model), model)
        return LocalJudge(model, tokenizer, self.config.model, weights=weights, max_tokens=self.config.max_tokens)
