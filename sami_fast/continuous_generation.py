"""Sampling responses with transformers' continuous batching: a sequence that ends makes room for the next at once.

The same requests and rules for their ends as `sami_fast.generation`, but random numbers that all sequences share: the
responses are others, and the same ones come again only from the same requests on the same device. Stop strings cut a
response when it is done; they do not end it earlier.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from sami_fast.generation import Generated, Job, cut, eos_ids, plan

_PAGE = 256  # tokens of a block of the cache, by default
_CPU_SEQUENCES = 32


def iter_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
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
    options: Mapping[str, Any] | None = None,
) -> Iterator[list[Generated]]:
    """As `sami_fast.generation.iter_responses`, giving each response as it is done.

    Args:
        batch_size: most sequences at work at the same time; on a CPU the cache has room for 32.
        options: further arguments of `transformers.ContinuousBatchingConfig`.

    Raises:
        ValueError: as there, or an option that is refused; before anything is generated.
        RuntimeError: transformers gave up on a request.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    sampling = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, batch_size=batch_size)
    jobs, stop = plan(
        tokenizer, prompts, num_return_sequences, limit=limit, seed=seed, stop=stop, done=done, **sampling
    )
    jobs.sort(key=lambda job: (job.ids, job.sample))  # neighbours share the blocks of their prefix
    eos = eos_ids(model, tokenizer)
    drawn = dict(do_sample=True, temperature=float(temperature), top_p=float(top_p), top_k=0) if temperature else {}
    generation = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=eos or -1, **drawn)
    # Another part of the same run draws other numbers, and so does what is left of one that was cut off.
    own = hashlib.sha256(f"{seed}/{[(job.prompt, job.sample, job.ids) for job in jobs]}".encode()).digest()
    batching = {"max_requests_per_batch": batch_size, "seed": int.from_bytes(own[:4], "big")}
    if model.device.type == "cpu" and jobs:  # left alone it takes most of the memory of the machine
        pages = -(-(max(len(job.ids) for job in jobs) + max_new_tokens) // _PAGE)
        batching["num_blocks"] = 1 + pages * min(batch_size, len(jobs), _CPU_SEQUENCES)
    batching |= options or {}
    return _responses(model, tokenizer, jobs, generation, batching_config(batching), eos, stop, progress)


def batching_config(options: Mapping[str, Any]) -> ContinuousBatchingConfig:
    """What transformers calls it.

    Raises:
        ValueError: an option that it does not know.
    """
    try:
        return ContinuousBatchingConfig(**options)
    except TypeError as error:
        raise ValueError(f"generation.continuous: expected arguments of ContinuousBatchingConfig: {error}") from None


def _responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    jobs: Sequence[Job],
    generation: GenerationConfig,
    batching: ContinuousBatchingConfig,
    eos: Sequence[int],
    stop: Sequence[str],
    progress: bool,
) -> Iterator[list[Generated]]:
    waiting = {str(number): job for number, job in enumerate(jobs)}
    if not waiting:
        return
    settings = {"generation_config": generation, "continuous_batching_config": batching}
    with (
        model.continuous_batching_context_manager(**settings, block=True) as manager,
        tqdm(total=len(jobs), desc="generating", unit="response", disable=not progress) as bar,
    ):
        try:
            for number, job in waiting.items():
                manager.add_request(job.ids, request_id=number)
            while waiting:
                result = manager.get_result(timeout=1)
                if result is None:
                    if not manager.is_running():
                        raise RuntimeError(f"generation.backend: continuous batching ended with {len(waiting)} to do")
                elif result.is_finished():
                    if result.error:
                        raise RuntimeError(f"generation.backend: continuous batching failed: {result.error}")
                    job = waiting.pop(result.request_id)
                    bar.update()
                    yield [Generated(job.prompt, job.sample, *cut(tokenizer, result.generated_tokens, eos, stop))]
        finally:
            for number in waiting:  # or the manager would finish what nobody waits for
                manager.cancel_request(number)
