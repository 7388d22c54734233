"""SAMI training on `transformers.Trainer`: groups in, one exact prefix-tree pass per pack, symmetric InfoNCE out."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from sami_fast.fused_layers import apply_liger, compile_layers, liger_options
from sami_fast.losses import infonce_loss
from sami_fast.prefix_tree import Group, PackedTree, pack_within
from sami_fast.scoring import Scores, check_model, score

logger = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """A loss or a gradient is NaN or infinite; nothing was updated or saved since the last good step."""


# `optim` -> class of torch-optimi and its arguments
_KAHAN_OPTIMIZERS = {
    "rmsprop": lambda args: ("Adam", dict(betas=(0.0, 0.99), eps=1e-8)),
    "adamw_torch": lambda args: ("AdamW", dict(betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon)),
    "sgd": lambda args: ("SGD", {}),
}


@dataclass
class SamiConfig(TrainingArguments):
    """`TrainingArguments` with the paper's defaults and what prefix trees add. Batch sizes count groups.

    Args:
        max_tokens: packed tokens of one forward and backward; the groups of a step are spread over as many packs as
            this takes, which changes memory and not the result.
        normalize: "mean" (the paper's) or "sum" over a response's tokens.
        beta: weight of KL(model || reference) per response token, averaged within each group; 0 is the paper's loss.
        master_weights: "fp32" keeps trainable weights in float32 and computes in the dtype they came in under autocast,
            so that a step far below bf16 spacing counts (at 5e-7 most do): per weight 4 bytes, 4 for its gradient and 4
            for RMSprop's average. "kahan" leaves 16-bit weights as they are and carries over what each update loses
            (Kahan summation, by torch-optimi): 2 + 2 bytes, and 2 each for the carry and Adam's two averages. There
            `optim` is adamw_torch, sgd or rmsprop, the last as Adam without momentum, which corrects its average for
            starting at 0. "none" trains weights as they are: 2 + 2 + 2 bytes in bf16, and small updates are lost.
        keep_attention: with gradient_checkpointing, keep each layer's attention output rather than compute it again.
        check_model: score a random tree both ways before the first step and stop when they disagree.
        dataloader_num_workers: processes that make packs while the device works; None is 1 for a GPU, which would wait
            for the host otherwise, and 0 for the CPU.

    Two of `TrainingArguments` fuse what lies between the matrix products of a layer. `torch_compile` compiles the
    decoder layers in place, once for packs of all sizes (`fused_layers.compile_layers`), rather than the whole model.
    `use_liger_kernel` takes Liger's kernels but for its losses, which would take the place of the head.
    """

    optim: str = field(default="rmsprop", metadata={"help": "optimiser; the paper's is RMSprop"})
    learning_rate: float = field(default=5e-7, metadata={"help": "initial learning rate; the paper's is 5e-7 for 7B"})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "schedule of the learning rate"})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "groups a step and device"})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "groups an evaluation batch and device"})
    logging_steps: float = field(default=1, metadata={"help": "log every that many steps"})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "a loss that is not finite stops training"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "groups have no columns"})
    dataloader_num_workers: int | None = field(default=None, metadata={"help": "processes that make packs ahead"})
    max_tokens: int = field(default=16384, metadata={"help": "packed tokens of one forward and backward"})
    normalize: str = field(default="mean", metadata={"help": '"mean" or "sum" over a response\'s tokens'})
    beta: float = field(default=0.0, metadata={"help": "weight of the KL to the reference model"})
    master_weights: str = field(default="fp32", metadata={"help": '"fp32", "kahan" or "none"'})
    keep_attention: bool = field(default=False, metadata={"help": "do not recompute attention when checkpointing"})
    check_model: bool = field(default=True, metadata={"help": "score a random tree both ways before training"})

    def __post_init__(self) -> None:
        for name, choices in (("normalize", ("mean", "sum")), ("master_weights", ("fp32", "kahan", "none"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {choices}, got {getattr(self, name)!r}")
        if self.max_tokens <= 0:
            raise ValueError(f"max_tokens: expected a positive number of tokens, got {self.max_tokens}")
        if self.beta < 0:
            raise ValueError(f"beta: expected a number >= 0, got {self.beta}")
        chosen = self.dataloader_num_workers
        self.dataloader_num_workers = chosen or 0
        super().__post_init__()
        if chosen is None and self.device.type != "cpu":
            self.dataloader_num_workers = 1
        if self.master_weights == "kahan" and self.optim not in _KAHAN_OPTIMIZERS:
            choices, got = sorted(_KAHAN_OPTIMIZERS), self.optim.value
            raise ValueError(f'optim: expected one of {choices} with master_weights="kahan", got {got!r}')
        if self.use_liger_kernel:
            self.liger_kernel_config = liger_options(self.liger_kernel_config)
            if self.torch_compile:
                raise ValueError("use_liger_kernel: expected one of torch_compile and use_liger_kernel, got both")


class SamiTrainer(Trainer):
    """Train a causal LM with SAMI on groups.

    Args:
        model: a causal LM of transformers, with or without PEFT adapters.
        args: the configuration.
        train_dataset, eval_dataset: sequences of `Group` (a list will do).
        ref_model: for `beta` > 0; None takes the model without its adapters, or a frozen copy of it as it is now.
        peft_config: wrap the model in these adapters first.
        others: as in `transformers.Trainer`.

    Raises:
        ValueError: a group with token ids or a length the model does not have, or above `max_tokens` by itself.
        UnsupportedModelError: a model that is not exact over prefix trees.
        NonFiniteError: while training, when a loss or gradient is not finite; the last checkpoint is kept.
    """

    def __init__(
        self,
        model: nn.Module,
        args: SamiConfig,
        train_dataset: Sequence[Group] | None = None,
        eval_dataset: Sequence[Group] | dict[str, Sequence[Group]] | None = None,
        *,
        ref_model: nn.Module | None = None,
        peft_config=None,
        **kwargs,
    ) -> None:
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        self.ref_model = ref_model
        if args.beta > 0 and ref_model is None:
            self.ref_model = model if hasattr(model, "disable_adapter") else copy.deepcopy(model)
        if args.master_weights == "fp32":
            args = _widen_trainable(model, args)
        elif args.master_weights == "kahan":
            kwargs.setdefault("optimizer_cls_and_kwargs", _kahan_optimizer(args))
        if args.master_weights != "kahan" and args.optim == "rmsprop":
            kwargs.setdefault("optimizer_cls_and_kwargs", _rmsprop(model, args))
        compiler = {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode}
        compiles = args.torch_compile
        if compiles:  # accelerate would compile the whole model, all of its layers one after the other
            args = dataclasses.replace(args, torch_compile=False, torch_compile_backend=None, torch_compile_mode=None)
        named = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
        for name, groups in {"train_dataset": train_dataset, **named}.items():
            _check_groups(name, groups, model, args.max_tokens)
        super().__init__(
            model=model,
            args=args,
            data_collator=PackCollator(args.max_tokens),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **kwargs,
        )
        if self.ref_model is not None and self.ref_model is not model:
            self.ref_model.requires_grad_(False).eval().to(self.args.device)
        if compiles:
            compile_layers(self.model, **compiler)
        if args.use_liger_kernel:
            apply_liger(self.model, args.liger_kernel_config)
        if args.check_model:
            check_model(self.model)
        self._unchecked: list[tuple[torch.Tensor, PackedTree]] = []  # losses of the step's groups
        self._recent: list[torch.Tensor] = []  # one row of metrics per group since the last log
        self._recent_tokens = self._recent_whole_tokens = 0
        self._last_log = time.perf_counter()

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch=None) -> torch.Tensor:
        """One step over all packs of the batch; each counts by its share of the batch's groups."""
        packs: list[PackedTree] = inputs["packs"]
        num_groups = sum(len(packed.shapes) for packed in packs)
        loss = torch.zeros((), device=self.args.device)
        for index, packed in enumerate(packs):
            last = index == len(packs) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                part = {"packed": packed, "share": len(packed.shapes) / num_groups}
                loss += super().training_step(model, part, num_items_in_batch)
        self._refuse_non_finite()
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        """Mean loss of a pack's groups times its share of the step."""
        scores = self._score(model, inputs["packed"])
        per_group, rows = _group_metrics(scores, self.args.beta)
        if model.training:
            self._unchecked.append((per_group.detach(), scores.packed))
        self._recent.append(rows)
        self._recent_tokens += scores.packed.num_tokens
        self._recent_whole_tokens += scores.packed.whole_tokens
        loss = per_group.mean() * inputs["share"]
        return (loss, scores) if return_outputs else loss

    def _score(self, model: nn.Module, packed: PackedTree) -> Scores:
        ref_model = None
        if self.args.beta > 0:
            ref_model = model if self.ref_model is self.model else self.ref_model
        return score(
            model,
            packed.to(self.args.device),
            normalize=self.args.normalize,
            ref_model=ref_model,
            keep_attention=self.args.keep_attention,
        )

    def _refuse_non_finite(self) -> None:
        """Keeps an update that is not finite out of the weights, and so out of the next checkpoint.

        The one time in a step that the host waits for the device, once all of the step's work is queued.
        """
        groups, self._unchecked = self._unchecked, []
        finite = torch.cat([per_group for per_group, _ in groups]).isfinite().all()
        grads = {}
        if self.accelerator.sync_gradients and self.accelerator.scaler is None:  # a scaler skips such steps itself
            grads = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        if grads:
            finite = finite & torch.nn.utils.get_total_norm(grads.values()).isfinite()
        if bool(finite):
            return
        step = self.state.global_step
        for per_group, packed in groups:
            bad = (~per_group.isfinite()).nonzero().flatten().tolist()
            if bad:
                weights = [name for name, p in self.model.named_parameters() if not bool(p.detach().isfinite().all())]
                cause = (
                    f"weight {weights[0]} is not finite" if weights else "all weights are finite, its scores are not"
                )
                raise NonFiniteError(
                    f"the loss of group {packed.group_name(bad[0])} is not finite at step {step}: {cause}"
                )
        name = next((name for name, grad in grads.items() if not bool(grad.isfinite().all())), "all weights together")
        raise NonFiniteError(f"the gradient of {name} is not finite at step {step}")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._recent and "loss" in logs:
            rows = self.accelerator.gather(torch.cat(self._recent).mean(dim=0, keepdim=True)).mean(dim=0)
            logs |= dict(zip(_METRICS[1:], rows.tolist()[1:], strict=True))
            now = time.perf_counter()
            logs["tokens_per_second"] = self._recent_whole_tokens / (now - self._last_log)
            logs["token_ratio"] = self._recent_whole_tokens / self._recent_tokens
            logs["tokens_saved"] = self._recent_whole_tokens - self._recent_tokens
            if self.args.beta == 0:
                del logs["kl"]
            self._recent, self._recent_tokens, self._recent_whole_tokens, self._last_log = [], 0, 0, now
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict) -> int:
        """6 FLOPs per parameter and encoded token."""
        tokens = sum(packed.num_tokens for packed in inputs["packs"])
        return 6 * tokens * sum(p.numel() for p in self.model.parameters())

    def evaluation_loop(
        self,
        dataloader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Metrics of held-out groups; `predictions` has a row of loss, MI, row and column accuracy and KL per group."""
        begin = time.perf_counter()
        model = self._wrap_model(self.model, training=False)
        if not self.accelerator._models and model is self.model:
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        model.eval()
        rows, tokens, whole_tokens = [], 0, 0
        for inputs in dataloader:
            batch = []
            for packed in inputs["packs"]:
                with torch.no_grad():
                    batch.append(_group_metrics(self._score(model, packed), self.args.beta)[1])
                tokens, whole_tokens = tokens + packed.num_tokens, whole_tokens + packed.whole_tokens
            rows.append(self.accelerator.gather_for_metrics(torch.cat(batch)))
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        table = torch.cat(rows)
        self._last_log += time.perf_counter() - begin  # evaluation is not training time
        metrics = dict(zip(_METRICS, table.mean(dim=0).tolist(), strict=True)) | {"token_ratio": whole_tokens / tokens}
        if self.args.beta == 0:
            del metrics["kl"]
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(table.cpu().numpy(), None, metrics, num_samples=len(table))


_METRICS = ("loss", "mutual_information", "row_accuracy", "column_accuracy", "kl")


def _group_metrics(scores: Scores, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each group [B], differentiable, and detached rows of `_METRICS` [B, 5]."""
    result = infonce_loss(scores, reduction="none")
    kl = torch.zeros_like(result.loss)
    if scores.kl is not None:
        pairs = accumulate((C * R for C, R in scores.packed.shapes), initial=0)
        offsets = torch.stack([scores.packed.offsets[pair] for pair in pairs])  # an index on the host would be copied
        kl = torch.segment_reduce(scores.kl, "mean", offsets=offsets, axis=0)
    loss = result.loss + beta * kl if beta > 0 else result.loss
    rows = (loss, result.mutual_information, result.row_accuracy, result.column_accuracy, kl)
    return loss, torch.stack([row.detach() for row in rows], dim=1)


@dataclass(frozen=True)
class PackCollator:
    """Groups of a batch -> {"packs": packed trees of at most `max_tokens` tokens}."""

    max_tokens: int

    def __call__(self, groups: list[Group]) -> dict[str, list[PackedTree]]:
        return {"packs": pack_within(groups, self.max_tokens)}


def _widen_trainable(model: nn.Module, args: SamiConfig) -> SamiConfig:
    """Trainable 16-bit weights become float32; compute stays in their dtype under autocast."""
    narrow = [p for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
    if not narrow:
        return args
    dtype = narrow[0].dtype
    for parameter in narrow:
        parameter.data = parameter.data.float()
    count = sum(p.numel() for p in narrow)
    logger.info("float32 master weights for %d trainable weights that came in %s; compute stays in it", count, dtype)
    if args.bf16 or args.fp16:
        return args
    return dataclasses.replace(args, bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16)


def _kahan_optimizer(args: SamiConfig) -> tuple[type[torch.optim.Optimizer], dict]:
    try:
        import optimi
    except ImportError as error:
        raise ImportError(
            'master_weights: "kahan" needs torch-optimi, which is not installed: pip install torch-optimi'
        ) from error
    name, options = _KAHAN_OPTIMIZERS[args.optim](args)
    logger.info("16-bit weights updated by optimi.%s with Kahan summation", name)
    return getattr(optimi, name), {"lr": args.learning_rate, "kahan_sum": True, **options}


_LARGE_WEIGHT = 1 << 20  # its update takes a GPU about as long as the launch of a kernel


def _rmsprop(model: nn.Module, args: SamiConfig) -> tuple[type[torch.optim.Optimizer], dict]:
    """RMSprop over lists of weights where they are small, as adapters are, so that launches do not dominate.

    One weight after the other where they are large: a list takes as much memory again as all weights of it.
    """
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    many_small = args.device.type != "cpu" and sum(sizes) < _LARGE_WEIGHT * len(sizes)
    return torch.optim.RMSprop, {"lr": args.learning_rate, "foreach": many_small}


def _check_groups(name: str, groups: Sequence[Group] | None, model: nn.Module, max_tokens: int) -> None:
    """Refuse before any work what would fail in the middle of an epoch."""
    if groups is None:
        return
    if not len(groups):
        raise ValueError(f"{name}: expected at least one group, got none")
    vocab_size = model.get_input_embeddings().weight.shape[0]
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    seen: dict[str, int] = {}
    for index in range(len(groups)):
        group = groups[index]
        if not isinstance(group, Group):
            raise ValueError(f"{name}[{index}]: expected a Group, got {type(group).__name__}")
        label = repr(group.id) if group.id is not None else f"number {index}"
        if group.id is not None and seen.setdefault(group.id, index) != index:
            raise ValueError(f"{name}: groups {seen[group.id]} and {index} share the id {label}")
        largest = max(int(ids.max()) for ids in (*group.prompts, *group.responses))
        if largest >= vocab_size:
            raise ValueError(f"{name}: group {label}: expected token ids below {vocab_size}, got {largest}")
        longest = max(map(len, group.prompts)) + max(map(len, group.responses))
        if limit is not None and longest > limit:
            raise ValueError(f"{name}: group {label}: expected sequences of at most {limit} tokens, got {longest}")
        if group.shape[0] * group.shape[1] * longest > max_tokens:
            pack_within([group], max_tokens)
