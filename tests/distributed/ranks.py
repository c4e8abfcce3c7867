"""What each rank does in the tests of this folder: run as ``ranks.py OUT SIZE`` with a rank's
environment. Its findings go to ``OUT/SIZE-RANK.pt``; ``test_ranks.py`` compares them."""

import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers as hf
from torch.distributed.checkpoint import state_dict as of_torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import beft_ext
from beft_ext import parallel
from beft_ext.errors import BeftError
from beft_ext.models import unsharded
from beft_ext.training.loss import model_loss
from beft_ext.training.steps import JoinedStep

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
STEPS = 4
ROWS = {2: (5, 3), 3: (4, 2, 1)}  # of each rank's batches
MISSING = {3: (2, 2)}  # the rank and the step that it has no batch for, and none after


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


def shard(model, ignored=None):
    """As docs/large-models.md says, and where ``ignored`` is empty, as it does not."""
    whole = unsharded(model) if ignored is None else ignored
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    for layer in (*layers, model):
        fully_shard(layer, ignored_params=whole)
    return model


def selection_of(model, loader):
    found = beft_ext.select(model, loader, lr=1e-2)
    gains = {k: getattr(found.gains, k) for k in ("values", "errors", "chance", "curve", "bands")}
    grams = found.gains.tensors()
    told = {"scores": found.scores, "ranking": found.ranking, "losses": found.losses}
    told |= {"dead": found.dead, "current": found.current, "examples": found.gains.examples}
    return told | {"gains": gains, "grams": grams, "frontier": found.gains.frontier}


def first_gradient(model, loader):
    """Of everything that trains, by name, after the first step's backward."""
    with parallel.meeting("a step", promised=True) as ranks:
        beft_ext.prepare(model, "value")
        optimizer = beft_ext.BiasAdamW(model, lr=0.0)
        step = JoinedStep(model.train(), optimizer, model_loss, False, ranks)
        loss, _ = step(loader[0], 0.0)
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": float(loss), "grads": grads}


def in_vain(model, loader):
    """What would get a gradient, of the names in a sharded model's layers, as they run."""
    seen = set()

    def look(layer, *_):
        seen.update(n for n, p in layer.named_parameters() if p.requires_grad)

    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    for layer in layers:  # after fully_shard's own hook: the parameters are whole
        layer.register_forward_pre_hook(look)
    first_gradient(model, loader)
    return seen


def own_loop(model, loader):
    """Parameters after three steps of a loop of one's own, and what they were trained with."""
    beft_ext.prepare(model, "value")
    optimizer = beft_ext.BiasAdamW(model, lr=1e-2)
    for own in loader[:3]:
        optimizer.zero_grad()
        model(**own).loss.backward()
        optimizer.step()
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def kept(name, wrap, folder, rank):
    """A trained model saved, loaded into another and merged: logits, and the whole state."""
    trained = wrap(model_of(name))
    beft_ext.prepare(trained, "value")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    data = {k: v for k, v in batch(name, 4, seed=7).items() if k != "labels"}
    found = {}
    with torch.no_grad():
        trained.eval()(**data)
        if rank == 0:  # alone, in the midst of forwards
            beft_ext.save_adapter(trained, folder)
        dist.barrier()
        found["trained"] = trained(**data).logits
        model = beft_ext.load_adapter(wrap(model_of(name)).eval(), folder)
        found["loaded"] = model(**data).logits
        beft_ext.merge_adapter(model)
        found["merged"] = model(**data).logits
    whole = of_torch.StateDictOptions(full_state_dict=True)
    found["state"] = of_torch.get_model_state_dict(model, options=whole)
    found["files"] = [p.read_bytes() for p in sorted(Path(folder).iterdir())]
    return found


def steps_by_hand(model, optimizer, numbers):
    """Optimizer's steps with gradients by chance, the same for whoever makes them."""
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def states(model, optimizer):
    """What torch.distributed.checkpoint saves and loads."""
    return {
        "model": of_torch.get_model_state_dict(model),
        "optimizer": of_torch.get_optimizer_state_dict(model, optimizer),
    }


def save_state(model, folder):
    beft_ext.prepare(model, "value")
    optimizer = beft_ext.BiasAdamW(model, lr=1e-2)
    steps_by_hand(model, optimizer, [1, 2])
    dcp.save(states(model, optimizer), checkpoint_id=str(folder))


def load_state(model, folder):
    """The next step after a state that others saved: what trains, and its scores."""
    beft_ext.prepare(model, "value")
    optimizer = beft_ext.BiasAdamW(model, lr=1e-3)
    state = states(model, optimizer)
    dcp.load(state, checkpoint_id=str(folder))
    of_torch.set_model_state_dict(model, state["model"])
    of_torch.set_optimizer_state_dict(model, optimizer, state["optimizer"])
    steps_by_hand(model, optimizer, [3])
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return {"trained": trained, "scores": optimizer.scores(), "lr": optimizer.param_groups[0]["lr"]}


def accuracy(model):
    data = batch("encoder", 16, seed=99)
    with torch.no_grad():
        predicted = model.eval()(**data).logits.argmax(1)
    return float((predicted == data["labels"]).float().mean())


def tuned(model, loader, folder, epochs=2, **options):
    recipe = beft_ext.Recipe(epochs=epochs, lr=1e-2)
    run = beft_ext.tune(model, loader, accuracy, folder, recipe, save_every=3, **options)
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return {"history": run.history, "trained": trained}


class Stopped(Exception):
    """In place of a kill."""


class Interrupted(list):
    """Batches of which the second pass breaks off."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        for number, own in enumerate(super().__iter__()):
            if self.passes == 2 and number == 3:
                raise Stopped
            yield own


def resumed(make, loader, folder):
    """A run that all ranks broke off in its second epoch, and went on with."""
    said = why(lambda: tuned(make(), Interrupted(loader), folder))
    return tuned(make(), loader, folder, resume=True) | {"said": said}


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


def alone_and_warned(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if "alone" in str(w.message)]


def refusals(rank, size):
    """What is said of each fault, by its name; the same faults on all ranks."""
    mine = batches_of("encoder", size, rank)
    broken = [dict(own) for own in mine]
    if rank == 1:
        broken[0]["labels"] = broken[0]["labels"] * 0 + 7  # no such class
    odd = model_of("encoder", seed=rank)
    late = model_of("bias-free")
    wrapped = DistributedDataParallel(late, find_unused_parameters=True)

    def drift():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            beft_ext.prepare(late, "value")
        optimizer = beft_ext.BiasAdamW(late, lr=1e-2)
        wrapped(**batches_of("bias-free", size, rank)[0]).loss.backward()
        optimizer.step()

    def nothing_here():
        beft_ext.select(model_of("encoder"), [] if rank == 1 else mine, steps=2)

    def others():
        beft_ext.select(model_of("encoder"), mine, lr=1e-2 if rank else 1e-3)

    def not_finite():
        raised = model_of("encoder")
        if rank == 1:
            mine[0]["inputs_embeds"] = torch.full((len(mine[0]["labels"]), 9, 32), torch.nan)
            mine[0].pop("input_ids")
        try:
            beft_ext.select(raised, mine, steps=0)
        finally:
            mine[:] = batches_of("encoder", size, rank)

    spread = shard(model_of("encoder"), ignored=set())
    split = model_of("encoder")
    mesh = dist.init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))
    parallelize_module(
        split.bert.encoder.layer[0].attention.self, mesh, {"query": ColwiseParallel()}
    )
    broken_off = shard(model_of("encoder"))

    def not_finite_in_shards():
        if rank == 1:
            mine[0]["inputs_embeds"] = torch.full((len(mine[0]["labels"]), 9, 32), torch.nan)
            mine[0].pop("input_ids")
        try:
            beft_ext.select(broken_off, mine, steps=0)
        finally:
            mine[:] = batches_of("encoder", size, rank)

    said = {
        "a row of a sharded model": why(not_finite_in_shards),
        "a sharded bias": why(lambda: beft_ext.prepare(spread, "value")),
        "a sharded bias, listened at": why(lambda: beft_ext.select(spread, mine)),
        "a sharded parameter that trains": why(lambda: beft_ext.BiasAdamW(spread)),
        "tensor parallelism": why(lambda: beft_ext.select(split, mine)),
    }
    said["and after it"] = selection_of(broken_off, mine)
    return said | {
        "wrapped first": why(lambda: beft_ext.prepare(wrapped, "value")),
        "drift": why(drift),
        "another model": why(lambda: beft_ext.select(odd, mine)),
        "another rate": why(others),
        "an empty rank": why(nothing_here),
        "a row": why(not_finite),
        "the same rows": why(
            lambda: beft_ext.select(model_of("encoder"), batches_of("encoder", size, 0))
        ),
        "graphs": why(
            lambda: beft_ext.tune(
                prepared(), mine, accuracy, "nowhere", beft_ext.Recipe(graphs=True)
            )
        ),
    }


def lost(rank, size):
    """The last rank ends in the middle of a selection."""

    def loader():
        yield batch("encoder", 4, seed=rank + 50)
        if rank == size - 1:
            os._exit(0)
        yield batch("encoder", 4, seed=rank + 60)

    return why(lambda: beft_ext.select(model_of("encoder"), loader(), steps=0))


def main(out, size):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), {}
    for name in MODELS:
        own = batches_of(name, size, rank)
        for how, make in (("", model_of), (", sharded", lambda name: shard(model_of(name)))):
            found[f"{name}{how}"] = selection_of(make(name), own)
            found[f"{name}{how}, first step"] = first_gradient(make(name), own)
    own = batches_of("encoder", size, rank)
    found["wrapped"] = selection_of(DistributedDataParallel(model_of("encoder")), own)
    found["tuned"] = tuned(prepared(), own, out / f"tuned-{size}")
    if size == 2:
        wrapped = prepared()
        found["tuned, wrapped"] = tuned(DistributedDataParallel(wrapped), own, out / "wrapped")
        found["tuned, wrapped"]["trained"] = {
            n: p.detach() for n, p in wrapped.named_parameters() if p.requires_grad
        }
        found["resumed"] = resumed(prepared, own, out / "resumed")
        found["tuned, sharded"] = tuned(shard(prepared()), own, out / "sharded")
        bare = batches_of("bias-free", size, rank)
        found["in vain"] = in_vain(shard(model_of("bias-free")), bare)
        found["own loop"] = own_loop(shard(model_of("bias-free")), bare)
        for name in ("encoder", "bias-free", FOLDED):
            for how, wrap in (("plain", lambda m: m), ("sharded", shard)):
                found[f"{name}, {how}, kept"] = kept(name, wrap, out / f"{name}-{how}", rank)
        save_state(shard(model_of("encoder")), out / "state-of-two")
        found["state of one"] = load_state(shard(model_of("encoder")), out / "state-of-one")
        found["refused"] = refusals(rank, size)
        parallel.ALONE = 0.5
        if rank == 0:
            select = lambda: beft_ext.select(model_of("encoder"), own, steps=0)  # noqa: E731
            found["alone"] = alone_and_warned(select)
            with parallel.alone():
                found["within alone"] = alone_and_warned(select)
    dist.barrier()
    if size == 3:
        if rank == size - 1:
            torch.save(found, out / f"{size}-{rank}.pt")
        found["lost"] = lost(rank, size)
    torch.save(found, out / f"{size}-{rank}.pt")
    os._exit(0)  # what is left of the group needs no farewell


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
