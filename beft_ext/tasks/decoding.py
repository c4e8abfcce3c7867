"""Evaluation of a language model in batches: each prompt is read once for all its options."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from beft_ext.models.offload import device_of
from beft_ext.tasks.batches import padded
from beft_ext.tasks.reading import takes
from beft_ext.training.counted import log_probabilities, logits_at

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedTokenizerBase

OPTIONS_AT_ONCE = 128  # options that continue from copies of the cache at a time


def shared_prompt_scores(
    model: nn.Module, pairs: Sequence[tuple[list[int], list[list[int]]]], pad: int
) -> list[list[float]]:
    """Mean log-probability of each option's tokens after its prompt.

    pairs: tokens of a prompt and of its options. Prompts are padded on the left, as for
    generation, and run once; options go on from copies of their cache.
    """
    device = device_of(model)
    prompts = padded([p for p, _ in pairs], pad, left=True).to(device)
    mask = padded([[1] * len(p) for p, _ in pairs], 0, left=True).to(device)
    last = torch.arange(1, len(pairs) + 1, device=device) * prompts.shape[1] - 1
    inputs = {"input_ids": prompts, "attention_mask": mask, **_positions(model, mask)}
    logits, output = logits_at(model, inputs, last, use_cache=True)
    begun = padded([[option[0] for option in options] for _, options in pairs], pad)
    first = log_probabilities(logits, begun.to(device))
    flat = [(i, n, o) for i, (_, options) in enumerate(pairs) for n, o in enumerate(options)]
    scores: list[list[float]] = [[] for _ in pairs]
    for begin in range(0, len(flat), OPTIONS_AT_ONCE):
        part = flat[begin : begin + OPTIONS_AT_ONCE]
        owners, numbers = torch.tensor([f[:2] for f in part], device=device).T
        options = padded([o for *_, o in part], pad).to(device)
        sums = first[owners, numbers]
        kept = padded([[1] * len(o) for *_, o in part], 0).to(device)
        if options.shape[1] > 1:
            sums = sums + _rest(model, output.past_key_values, mask[owners], owners, options, kept)
        means = (sums / kept.sum(-1)).tolist()
        for (i, *_), mean in zip(part, means, strict=True):
            scores[i].append(mean)
    return scores


def _rest(
    model: nn.Module, cache: Cache, mask: Tensor, owners: Tensor, options: Tensor, kept: Tensor
) -> Tensor:
    """Log-probabilities of the second token of each option and on, summed, ``(N,)``."""
    copied = copy.deepcopy(cache)
    copied.batch_select_indices(owners)
    whole = torch.cat([mask, kept[:, :-1]], dim=1)
    positions = _positions(model, whole)
    if positions:
        positions = {"position_ids": positions["position_ids"][:, mask.shape[1] :]}
    inputs = {"input_ids": options[:, :-1], "attention_mask": whole, **positions}
    inputs["cache" if takes(model, "cache") else "past_key_values"] = copied  # renamed in 5.24
    said = kept[:, 1:].bool()
    logits, _ = logits_at(model, inputs, said.flatten().nonzero().flatten(), use_cache=True)
    logs = log_probabilities(logits, options[:, 1:][said][:, None])[:, 0]
    return logs.new_zeros(said.shape).masked_scatter(said, logs).sum(-1)


def greedy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    new_tokens: int,
) -> list[str]:
    """The most likely continuation of each prompt, up to the end of its line."""
    device, pad = device_of(model), tokenizer.pad_token_id or 0
    line = tokenizer("\n", add_special_tokens=False)["input_ids"][-1:]
    stops = [t for t in (*line, tokenizer.eos_token_id) if t is not None]
    ids = padded(prompts, pad, left=True).to(device)
    found = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=padded([[1] * len(p) for p in prompts], 0, left=True).to(device),
        do_sample=False,  # and nothing else that the folder's generation_config.json may ask for
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=new_tokens,
        eos_token_id=stops or None,
        pad_token_id=pad,
    )
    texts = tokenizer.batch_decode(found[:, ids.shape[1] :], skip_special_tokens=True)
    return [text.strip().partition("\n")[0].strip() for text in texts]


def _positions(model: nn.Module, mask: Tensor) -> dict[str, Tensor]:
    """Positions that count from each row's first real token, for models that take them."""
    if not takes(model, "position_ids"):
        return {}
    return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
