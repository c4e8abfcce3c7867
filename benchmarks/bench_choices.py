"""What does it take to rank options by a decoder, beside the authors' loop over single options?

Random decoders (the larger on a GPU alone) and questions of three kinds: yes or no after a
passage, two long choices (as COPA), many choices after a long passage (as ReCoRD). Ours in
batches of 8, from long to short. Writes benchmarks/results/<device>/choices.json.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from harness import Case, measure, settings, show, write
from peers import one_by_one

from beft_ext.tasks import PromptObjective, Task
from beft_ext.tasks.batches import Batches, Encoded
from beft_ext.tasks.prompts import Prompt

VOCABULARY, BATCH = 50_272, 8
DECODERS = {"6 x 384": (6, 384, 6), "OPT-125M's shape": (12, 768, 12)}
# Questions, tokens of their prompts, options, tokens of an option.
KINDS = {
    "yes or no": (32, 128, 2, 1),
    "two choices": (32, 16, 2, 8),
    "many choices": (8, 192, 12, 24),
}
QUESTION = Task(text="{q}", kind="choice", prompt="{q}", options="options")


class _Tokens:
    """A tokenizer for a task that has its tokens already."""

    pad_token_id, bos_token_id = 1, None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": []}


@functools.cache
def decoder(layers: int, width: int, heads: int, device: str) -> Any:
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        word_embed_proj_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        ffn_dim=4 * width,
    )
    return transformers.OPTForCausalLM(config).to(device).eval()


def questions(
    count: int, prompt: int, options: int, length: int
) -> list[tuple[list[int], list[list[int]]]]:
    """Lengths vary by a quarter, as in a real task; single tokens stay single."""
    generator = torch.Generator().manual_seed(0)

    def tokens(size: int) -> list[int]:
        size += int(torch.randint(-(size // 4), size // 4 + 1, (), generator=generator))
        return torch.randint(4, VOCABULARY, (size,), generator=generator).tolist()

    return [(tokens(prompt), [tokens(length) for _ in range(options)]) for _ in range(count)]


def case(which: str, shape: tuple[int, int, int], kind: str, device: str) -> Case:
    model, asked = decoder(*shape, device), questions(*KINDS[kind])
    if which == "one by one":
        return lambda: one_by_one(model, asked)
    objective = PromptObjective(QUESTION, _Tokens(), model)
    rows = [
        Encoded(Prompt(prompt, options), 0.0, len(prompt), len(options))
        for prompt, options in asked
    ]
    batches = Batches(rows, objective.options, BATCH)
    return lambda: objective.predict(model, batches)


def main() -> None:
    arguments = settings(__doc__, rounds=3)
    results: dict[str, Any] = {}
    small = arguments.quick or arguments.device == "cpu"
    for name, shape in list(DECODERS.items())[: 1 if small else None]:
        for kind in KINDS:
            makers = {
                which: functools.partial(case, which, shape, kind, arguments.device)
                for which in ("ours", "one by one")
            }
            results[f"{name}, {kind}"] = measure(makers, arguments)
            show(f"{name}, {kind}", results[f"{name}, {kind}"])
    write("choices", arguments, {"ranking": results})


if __name__ == "__main__":
    main()
