"""What the ranks in the tests of this folder work on: tiny models, batches of each rank's own."""

import torch
import transformers as hf
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, IterableDataset

import beft_ext
from beft_ext.errors import BeftError
from beft_ext.models import unsharded

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODELS = {
    "encoder": lambda: hf.BertForSequenceClassification(
        hf.BertConfig(**SIZES, intermediate_size=48, **STILL)
    ),
    "decoder": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0, pad_token_id=0)
    ),
    "bias-free": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, pad_token_id=0)
    ),
}
FOLDED = "folded"  # its value bias merges into the output projection
MADE = MODELS | {
    FOLDED: lambda: hf.GPTNeoForCausalLM(
        hf.GPTNeoConfig(
            hidden_size=32, num_heads=4, vocab_size=64, num_layers=2, window_size=4,
            attention_types=[[["global", "local"], 1]], pad_token_id=0,
        )
    )
}  # fmt: skip
MODELS["encoder in fp64"] = MADE["encoder in fp64"] = lambda: MODELS["encoder"]().double()
# Four ranks on a machine of two cores take their time.
NAMES = {2: list(MODELS), 4: ["encoder", "bias-free"]}
CASES = [(size, name) for size, names in NAMES.items() for name in names]
STEPS = 4
ROWS = {2: (5, 3), 4: (4, 2, 1, 1)}  # of each rank's batches
MISSING = {4: (3, 2)}  # the rank and the step that it has no batch for, and none after


def model_of(name, seed=0):
    torch.manual_seed(seed)
    model = MADE[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def batch(name, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (rows, 9), generator=generator)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name.startswith("encoder"):
        return found | {"labels": torch.randint(0, 2, (rows,), generator=generator)}
    labels = ids.clone()
    labels[:, : 2 + seed % 4] = -100  # ranks have unequal numbers of labels
    return found | {"labels": labels}


def batches_of(name, size, rank):
    """A rank's own batches."""
    last = MISSING.get(size, (None, STEPS))
    count = last[1] if rank == last[0] else STEPS
    return [batch(name, ROWS[size][rank], seed=1 + 10 * rank + i) for i in range(count)]


def batches_of_all(name, size):
    """What one process reads: each step's batches of all ranks as one."""
    ranks = [batches_of(name, size, r) for r in range(size)]
    steps = [[own[i] for own in ranks if i < len(own)] for i in range(STEPS)]
    return [{k: torch.cat([b[k] for b in step]) for k in step[0]} for step in steps]


class Stopped(Exception):
    """In place of a kill."""


class Stream(IterableDataset):
    """Batches whose number nobody knows. stop: of the second pass, the batch that does not come."""

    def __init__(self, batches, stop=None):
        self.batches, self.stop, self.passes = batches, stop, 0

    def __iter__(self):
        self.passes += 1
        for number, own in enumerate(self.batches):
            if self.passes == 2 and number == self.stop:
                raise Stopped
            yield own


def stream(batches, stop=None):
    """A loader without a length."""
    return DataLoader(Stream(batches, stop), batch_size=None)


def shard(model, ignored=None):
    """As docs/large-models.md says, and where ``ignored`` is empty, as it does not."""
    whole = unsharded(model) if ignored is None else ignored
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    for layer in (*layers, model):
        fully_shard(layer, ignored_params=whole)
    return model


def prepared(name="encoder"):
    model = model_of(name)
    beft_ext.prepare(model, "value")
    return model


def why(call):
    try:
        call()
    except (BeftError, Stopped) as error:
        return f"{type(error).__name__}: {error}"
    return None
