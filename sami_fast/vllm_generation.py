"""Sampling responses with vLLM, whose cache keeps what prompts share; an option for GPUs.

The same requests and rules for their ends as `sami_fast.generation`, but vLLM's own random numbers: the responses are
others, and vLLM promises the same ones again only for the same batches on the same device.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from sami_fast.generation import Generated, Job, cut, merge_eos_ids, plan


class VllmEngine:
    """A model in vLLM, with prefix caching. At the end of a `with` statement the GPU's memory is free again.

    Args:
        name: folder or hub name of the model.
        tokenizer: its tokenizer.
        dtype: "auto", "float32", "bfloat16" or "float16".
        trust_remote_code: run code that comes with the model.
        options: further arguments of `vllm.LLM`.

    Raises:
        RuntimeError: vLLM is not installed.
    """

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        dtype: str = "auto",
        trust_remote_code: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            import vllm
        except ImportError:
            raise RuntimeError(
                'generation.backend: vllm is not installed; run: pip install "sami-fast[vllm]"'
            ) from None
        self._sampling_params = vllm.SamplingParams
        self._tokenizer = tokenizer
        self._eos = _eos_ids(name, tokenizer, trust_remote_code)
        own = dict(dtype=dtype, trust_remote_code=trust_remote_code, enable_prefix_caching=True)
        self._engine = vllm.LLM(model=name, **own | dict(options or {}))

    def __enter__(self) -> VllmEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        core = getattr(self._engine.llm_engine, "engine_core", None)
        if hasattr(core, "shutdown"):
            core.shutdown()
        del self._engine
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def iter_responses(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        batch_size: int = 1024,
        seed: int = 0,
        num_return_sequences: int = 1,
        stop: str | Sequence[str] | None = None,
        done: Collection[tuple[int, int]] = (),
        progress: bool = True,
    ) -> Iterator[list[Generated]]:
        """As `sami_fast.generation.iter_responses`, with prompts in their order, so that neighbours share prefixes."""
        sampling = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
        limit = self._engine.llm_engine.model_config.max_model_len
        jobs, stop = plan(
            self._tokenizer,
            prompts,
            num_return_sequences,
            limit=limit,
            batch_size=batch_size,
            seed=seed,
            stop=stop,
            done=done,
            **sampling,
        )
        jobs.sort(key=lambda job: (job.prompt, job.sample))
        return self._batches(jobs, batch_size, stop, progress, sampling)

    def _batches(
        self, jobs: Sequence[Job], batch_size: int, stop: list[str], progress: bool, sampling: dict[str, Any]
    ) -> Iterator[list[Generated]]:
        common = dict(
            max_tokens=sampling["max_new_tokens"],
            temperature=sampling["temperature"],
            top_p=sampling["top_p"],
            stop=stop or None,
            stop_token_ids=self._eos or None,
            skip_special_tokens=False,
        )
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            outputs = self._engine.generate(
                [{"prompt_token_ids": job.ids} for job in batch],
                [self._sampling_params(seed=None if job.seed is None else job.seed % 2**31, **common) for job in batch],
                use_tqdm=progress,
            )
            yield [
                Generated(job.prompt, job.sample, *cut(self._tokenizer, row, self._eos, stop))
                for job, row in zip(batch, (list(output.outputs[0].token_ids) for output in outputs), strict=True)
            ]


def _eos_ids(name: str, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool) -> list[int]:
    try:
        of_model = GenerationConfig.from_pretrained(name).eos_token_id
    except OSError:  # a model without a file of generation settings
        of_model = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code).eos_token_id
    return merge_eos_ids(of_model, tokenizer)
