"""What ranks are told of each fault, by its name; each of them is told, and goes on."""

import warnings

import torch
import torch.distributed as dist
from rank_data import (
    MADE,
    STEPS,
    batch,
    batches_of,
    model_of,
    prepared,
    shard,
    stream,
    why,
)
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import beft_ext
from beft_ext.selection import audition, terms_of
from beft_ext.tasks import Batches
from beft_ext.tasks.batches import Encoded


def without_gloo():
    """Before any meeting: after it the ranks have what they need."""
    known, dist.is_gloo_available = dist.is_gloo_available, lambda: False
    try:
        return why(lambda: beft_ext.measure_gains(model_of("encoder"), []))
    finally:
        dist.is_gloo_available = known


def of_models(rank, size):
    """Of wrappers, of what is not here as a whole, and of models that are not the same."""
    mine = batches_of("encoder", size, rank)
    odd, late = model_of("encoder", seed=rank), model_of("bias-free")
    wrapped = DistributedDataParallel(late, find_unused_parameters=True)

    def drift():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            beft_ext.prepare(late, "value")
        optimizer = beft_ext.BiasAdamW(late, lr=1e-2)
        wrapped(**batches_of("bias-free", size, rank)[0]).loss.backward()
        optimizer.step()

    def empty():
        with torch.device("meta" if rank == 1 else "cpu"):
            return MADE["encoder"]()

    spread = shard(model_of("encoder"), ignored=set())
    split = model_of("encoder")
    mesh = dist.init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))
    parallelize_module(
        split.bert.encoder.layer[0].attention.self, mesh, {"query": ColwiseParallel()}
    )
    odd_and_prepared = model_of("encoder", seed=rank)
    beft_ext.prepare(odd_and_prepared, "value")
    return {
        "a sharded bias": why(lambda: beft_ext.prepare(spread, "value")),
        "a sharded bias, listened at": why(lambda: beft_ext.select(spread, mine)),
        "a sharded parameter that trains": why(lambda: beft_ext.BiasAdamW(spread)),
        "tensor parallelism": why(lambda: beft_ext.select(split, mine)),
        "wrapped first": why(lambda: beft_ext.prepare(wrapped, "value")),
        "drift": why(drift),
        "another model": why(lambda: beft_ext.select(odd, mine)),
        "another model, trained": why(lambda: beft_ext.tune(odd_and_prepared, mine)),
        "a model without values": why(lambda: beft_ext.select(empty(), mine)),
        "a model without values, measured": why(lambda: beft_ext.measure_gains(empty(), mine)),
        "a model without values, trained": why(lambda: beft_ext.tune(empty(), mine)),
    }


def of_settings(rank, size):
    """Of arguments that are not the same, or do not go together."""
    mine = batches_of("encoder", size, rank)
    select, tune = beft_ext.select, beft_ext.tune
    rate, steps = 1e-2 if rank else 1e-3, STEPS - rank
    graphs, uneven = beft_ext.Recipe(graphs=True), beft_ext.Recipe(lr=rate)
    return {
        "another rate": why(lambda: select(model_of("encoder"), mine, lr=rate)),
        "another rate, trained": why(lambda: tune(prepared(), mine, recipe=uneven)),
        "other steps": why(lambda: select(model_of("encoder"), stream(mine), steps=steps)),
        "other steps, trained": why(lambda: tune(prepared(), stream(mine), steps=steps)),
        "no steps": why(lambda: select(model_of("encoder"), stream(mine))),
        "no steps, trained": why(lambda: tune(prepared(), stream(mine))),
        "graphs": why(lambda: tune(prepared(), mine, recipe=graphs)),
    }


def of_rows(rank, size):
    """Of rows that are missing, the same, or not finite."""
    mine = batches_of("encoder", size, rank)
    none, first = [] if rank == 1 else mine, batches_of("encoder", size, 0)
    select, tune = beft_ext.select, beft_ext.tune
    broken = [dict(own) for own in mine]
    if rank == 1:
        broken[0]["inputs_embeds"] = torch.full((len(mine[0]["labels"]), 9, 32), torch.nan)
        broken[0].pop("input_ids")
    spread = shard(model_of("encoder"))
    return {
        "an empty rank": why(lambda: select(model_of("encoder"), none, steps=2)),
        "an empty stream": why(lambda: select(model_of("encoder"), stream(none), steps=2)),
        "an empty rank, measured": why(
            lambda: beft_ext.measure_gains(model_of("encoder"), stream(none))
        ),
        "an empty rank, trained": why(lambda: tune(prepared(), stream(none), steps=2)),
        "too few": why(lambda: tune(prepared(), stream(mine), steps=STEPS + 1)),
        "a row": why(lambda: select(model_of("encoder"), broken, steps=0)),
        "a row of a sharded model": why(lambda: select(spread, broken, steps=0)),
        "the same rows": why(lambda: select(model_of("encoder"), first)),
        "the same rows, trained": why(lambda: tune(prepared(), first)),
        "other racers' rows": why(lambda: race(rows(rank))),
        "a stream of racers' rows": why(lambda: race(stream(mine))),
    }, spread


def rows(rank):
    """The last one is of its rank alone."""
    tokens = batch("encoder", 8, seed=3)["input_ids"].tolist()
    tokens[-1][0] += rank
    made = [Encoded(row, i % 2, 9) for i, row in enumerate(tokens)]

    def collate(rows):
        ids, labels = [row.fields for row in rows], [row.label for row in rows]
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}

    return Batches(made, collate, 2, seed=0)


def race(batches):
    audition({"value": terms_of(model_of("encoder"), "value")}, batches, [1e-3], budget=20)
