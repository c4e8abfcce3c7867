"""What each rank does in the tests of this folder: run as ``ranks.py OUT SIZE`` with a rank's
environment. Its findings go to ``OUT/SIZE-RANK.pt``; ``test_ranks.py`` compares them."""

import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rank_data import (
    FOLDED,
    NAMES,
    STEPS,
    batch,
    batches_of,
    model_of,
    prepared,
    shard,
    stream,
    why,
)
from rank_faults import of_models, of_rows, of_settings, without_gloo
from torch.distributed.checkpoint import state_dict as of_torch
from torch.nn.parallel import DistributedDataParallel

import beft_ext
from beft_ext import parallel
from beft_ext.training.loss import model_loss
from beft_ext.training.steps import JoinedStep


def selection_of(model, loader, **options):
    found = beft_ext.select(model, loader, lr=1e-2, **options)
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


def resumed(batches, folder):
    """A run over streams that all ranks broke off in its second epoch, and went on with."""
    said = why(lambda: tuned(prepared(), stream(batches, stop=3), folder, steps=STEPS))
    again = tuned(prepared(), stream(batches), folder, steps=STEPS, resume=True)
    return again | {"said": said}


def judged(batches):
    """What a run's epochs reach on batches that each rank has a part of."""
    recipe = beft_ext.Recipe(epochs=2, lr=1e-2)
    run = beft_ext.tune(prepared(), stream(batches), stream(batches), recipe=recipe, steps=STEPS)
    return [record["validation_loss"] for record in run.history]


def refusals(rank, size):
    """What is said of each fault; and what a sharded model finds after one."""
    told, spread = of_rows(rank, size)
    told |= of_models(rank, size) | of_settings(rank, size)
    return told | {"and after it": selection_of(spread, batches_of("encoder", size, rank))}


def alone_and_warned(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if "alone" in str(w.message)]


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
    no_gloo = without_gloo()
    for name in NAMES[size]:
        own = batches_of(name, size, rank)
        for how, make in (("", model_of), (", sharded", lambda name: shard(model_of(name)))):
            found[f"{name}{how}"] = selection_of(make(name), own)
            found[f"{name}{how}, first step"] = first_gradient(make(name), own)
    own = batches_of("encoder", size, rank)
    found["wrapped"] = selection_of(DistributedDataParallel(model_of("encoder")), own)
    found["streamed"] = selection_of(model_of("encoder"), stream(own), steps=STEPS + 2)
    found["tuned"] = tuned(prepared(), own, out / f"tuned-{size}")
    found["resumed"] = resumed(own, out / f"resumed-{size}")
    found["judged"] = judged(own)
    if size == 2:
        wrapped = prepared()
        found["tuned, wrapped"] = tuned(DistributedDataParallel(wrapped), own, out / "wrapped")
        found["tuned, wrapped"]["trained"] = {
            n: p.detach() for n, p in wrapped.named_parameters() if p.requires_grad
        }
        found["tuned, sharded"] = tuned(shard(prepared()), own, out / "sharded")
        bare = batches_of("bias-free", size, rank)
        found["in vain"] = in_vain(shard(model_of("bias-free")), bare)
        found["own loop"] = own_loop(shard(model_of("bias-free")), bare)
        for name in ("encoder", "bias-free", FOLDED):
            for how, wrap in (("plain", lambda m: m), ("sharded", shard)):
                found[f"{name}, {how}, kept"] = kept(name, wrap, out / f"{name}-{how}", rank)
        save_state(shard(model_of("encoder")), out / "state-of-two")
        found["state of one"] = load_state(shard(model_of("encoder")), out / "state-of-one")
        found["refused"] = refusals(rank, size) | {"no gloo": no_gloo}
        parallel.ALONE = 0.5
        if rank == 0:
            select = lambda: beft_ext.select(model_of("encoder"), own, steps=0)  # noqa: E731
            found["alone"] = alone_and_warned(select)
            with parallel.alone():
                found["within alone"] = alone_and_warned(select)
    dist.barrier()
    if size == 4:
        if rank == size - 1:
            torch.save(found, out / f"{size}-{rank}.pt")
        found["lost"] = lost(rank, size)
    torch.save(found, out / f"{size}-{rank}.pt")
    os._exit(0)  # what is left of the group needs no farewell


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
