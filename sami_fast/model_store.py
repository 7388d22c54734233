"""The models of a run by name: the base model and those that training leaves, one in memory at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from pathlib import Path
from typing import Any

import torch

from sami_fast.config import ModelConfig, load_model
from sami_fast.stages import digest, outputs_digest, read_manifest


def weights_digest(found: str, model: Any) -> str:
    """`ModelStore.digest` of a loaded model; one of the hub is told by the commit that was loaded, beside its name."""
    commit = getattr(model.config, "_commit_hash", None)
    return f"{found}@{commit}" if commit else found


class ModelStore:
    """Loads models, and keeps the last one until another is asked for.

    Args:
        config: of the base model; every other is a folder, loaded with the same settings.

    Raises:
        ValueError: the base model has an adapter.
    """

    def __init__(self, config: ModelConfig) -> None:
        if config.adapter is not None:
            raise ValueError(f"model.adapter: expected None, a run starts from a whole model, got {config.adapter!r}")
        self.config = config
        self._loaded: tuple[tuple[str, str], Any, Any] | None = None
        self._digests: dict[str, str] = {}
        self._dtype: str | None = None

    def digest(self, name: str) -> str:
        """What tells one model from another: a hash of its files, or the name that the hub knows it by."""
        path = Path(self.path(name))
        with contextlib.suppress(ValueError):  # some other program's file of that name
            stage = read_manifest(path.parent)
            if stage is not None and path.name == "model" and stage["status"] == "complete":
                return outputs_digest(stage, "model/")  # taken when training ended
        if name not in self._digests:
            self._digests[name] = digest(path) if path.is_dir() else name
        return self._digests[name]

    def path(self, name: str) -> str:
        """What `from_pretrained` takes."""
        if name == "bundled":
            from sami_fast.bundled import bundled_model_path

            return str(bundled_model_path())
        return name

    @property
    def dtype(self) -> str:
        """Name of the dtype that all models of the run compute in: as configured, or as the base model is stored."""
        if self.config.dtype != "auto":
            return self.config.dtype
        if self._dtype is None:
            stored = (
                getattr(self._config(self.config.name), "dtype", None) or self._load(self.config.name, "auto")[0].dtype
            )
            self._dtype = str(stored).removeprefix("torch.")
        return self._dtype

    def positions(self, name: str) -> int | None:
        """The longest sequence that a model takes, where its configuration says so."""
        return getattr(self._config(name).get_text_config(decoder=True), "max_position_embeddings", None)

    def _config(self, name: str) -> Any:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.path(name), trust_remote_code=self.config.trust_remote_code)

    def tokenizer(self, name: str) -> Any:
        """Its tokenizer alone."""
        from transformers import AutoTokenizer

        if self._loaded is not None and self._loaded[0][0] == name:
            return self._loaded[2]
        return AutoTokenizer.from_pretrained(self.path(name), trust_remote_code=self.config.trust_remote_code)

    def get(self, name: str) -> tuple[Any, Any]:
        """Model and tokenizer, to be left as they are."""
        return self._load(name, self.dtype)

    def take(self, name: str, dtype: str) -> tuple[Any, Any]:
        """Model and tokenizer, to be changed: whoever asks for this model next has it loaded anew."""
        found = self._load(name, dtype)
        self.drop()
        return found

    def drop(self) -> None:
        """Keep no model in memory."""
        self._loaded = None
        gc.collect()  # a trainer and its model hold each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _load(self, name: str, dtype: str) -> tuple[Any, Any]:
        if self._loaded is None or self._loaded[0] != (name, dtype):
            self.drop()
            model, tokenizer = load_model(dataclasses.replace(self.config, name=self.path(name), dtype=dtype))
            self._loaded = ((name, str(model.dtype).removeprefix("torch.")), model, tokenizer)
        return self._loaded[1:]
