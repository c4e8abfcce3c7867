"""tune: the best epoch is kept, and a killed run goes on to the same bits."""

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import batch, tiny
from safetensors import safe_open
from safetensors.torch import load_file

import beft_ext
from beft_ext.errors import BeftWarning
from beft_ext.training import tuning
from beft_ext.training.data import Passes, digest_of
from beft_ext.training.evaluation import mean_loss
from beft_ext.training.optim import OptimizerError, rate_factor
from beft_ext.training.tuning import CHECKPOINT, Recipe, TuningError, tune

RECIPE = Recipe(epochs=3, lr=1e-2)


def prepared():
    model = tiny("bert").requires_grad_(False)
    for name, p in model.named_parameters():
        p.requires_grad_("value.bias" in name or name.startswith("classifier"))
    return model


def loader():
    return [batch(seed=i) for i in range(5)]


def falling_loss(model):
    """A metric: minus the loss on one batch."""
    model.eval()
    with torch.no_grad():
        return -float(model(**batch(seed=99)).loss)


def test_trains_only_what_requires_grad_and_logs_each_epoch(tmp_path):
    model = prepared()
    before = {n: p.clone() for n, p in model.named_parameters()}
    progress = tune(model, loader(), falling_loss, tmp_path, RECIPE, metric="minus loss")
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad
    lines = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == progress.history and [x["epoch"] for x in lines] == [1, 2, 3]
    assert falling_loss(model) == max(x["minus loss"] for x in lines)


def test_each_epoch_is_reported_as_it_ends(tmp_path):
    heard = []
    progress = tune(prepared(), loader(), falling_loss, None, RECIPE, report=heard.append)
    assert heard == progress.history and len(heard) == 3


SCHEDULES = {
    "constant": ({"warmup": 0.0, "decay": False}, [1, 1, 1, 1, 1]),
    "rising": ({"warmup": 0.4, "decay": False}, [1 / 2, 1, 1, 1, 1]),
    "falling": ({"warmup": 0.4, "weight_decay": 0.5}, [1 / 2, 1, 3 / 4, 1 / 2, 1 / 4]),
    "clipped": ({"warmup": 0.0, "decay": False, "max_grad_norm": 0.05}, [1, 1, 1, 1, 1]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_epoch_is_torchs_adamw_at_these_rates(tmp_path, name):
    """Oracle: torch's AdamW and clipping in a loop of its own, the rates written out."""
    options, factors = SCHEDULES[name]
    recipe = Recipe(epochs=1, lr=1e-2, **options)
    ours, oracle = prepared(), prepared()
    tune(ours, loader(), falling_loss, tmp_path, recipe)
    torch.manual_seed(recipe.seed)
    parameters = [p for p in oracle.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=options.get("weight_decay", 0.0))
    oracle.train()
    for inputs, factor in zip(loader(), factors, strict=True):
        optimizer.param_groups[0]["lr"] = 1e-2 * factor
        optimizer.zero_grad()
        oracle(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, options.get("max_grad_norm", 1.0))
        optimizer.step()
    for a, b in zip(ours.parameters(), oracle.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_the_recipe_clips(tmp_path):
    """Gradients far below AdamW's eps of 1e-8 move nothing by more than their share of it."""
    model = prepared()
    before = [p.detach().clone() for p in model.parameters()]
    recipe = Recipe(epochs=1, lr=1e-2, max_grad_norm=1e-12)
    tune(model, loader(), falling_loss, tmp_path, recipe)
    for p, b in zip(model.parameters(), before, strict=True):
        rounding = len(loader()) * torch.finfo(p.dtype).eps * b.abs()
        assert ((p - b).abs() <= len(loader()) * 1e-2 * 1e-12 / 1e-8 + rounding).all()


class Numbered(list):
    numbers = ()

    def set_epoch(self, number):
        self.numbers += (number,)


def test_a_loader_is_told_the_number_of_each_epoch(tmp_path):
    told = Numbered(loader())
    tune(prepared(), told, falling_loss, tmp_path, RECIPE)
    assert told.numbers == (0, 1, 2)


class Killed(Exception):
    pass


def test_resumed_after_any_step_it_ends_in_the_same_bits(tmp_path):
    whole = prepared()
    tune(whole, loader(), falling_loss, tmp_path / "whole", RECIPE, save_every=1)

    class Stopping(list):
        """Stands for a kill: stops the run in the middle of an epoch."""

        left = 7

        def __iter__(self):
            for item in super().__iter__():
                if Stopping.left == 0:
                    raise Killed
                Stopping.left -= 1
                yield item

    folder = tmp_path / "parts"
    for _ in range(20):
        model = prepared()
        Stopping.left = 7
        try:
            tune(model, Stopping(loader()), falling_loss, folder, RECIPE, save_every=2, resume=True)
            break
        except Killed:
            torch.manual_seed(12345)  # whatever ran in between must not matter
    for a, b in zip(whole.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert (folder / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()


@pytest.mark.parametrize("batches", [1, 2])
def test_killed_between_an_epochs_last_step_and_its_end_it_goes_on(tmp_path, batches):
    def killed(_):
        raise Killed

    whole, model, data = prepared(), prepared(), loader()[:batches]
    tune(whole, data, falling_loss, tmp_path / "whole", RECIPE)
    with pytest.raises(Killed):
        tune(model, data, killed, tmp_path / "a", RECIPE, save_every=1)
    tune(model := prepared(), data, falling_loss, tmp_path / "a", RECIPE, resume=True)
    for a, b in zip(whole.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_is_written_every_fifty_steps(tmp_path):
    data = broken_off(lambda: loader()[:1] * 60, 55)
    with pytest.raises(Killed):
        tune(prepared(), data, falling_loss, tmp_path, Recipe(epochs=1))
    with safe_open(tmp_path / CHECKPOINT, "pt") as file:
        assert json.loads(file.metadata()["progress"])["step"] == 50
        assert file.metadata()["version"] == beft_ext.__version__


SCRIPT = """
import sys; sys.path[:0] = sys.argv[2:]
from test_tuning import *
recipe = Recipe(epochs=8, lr=1e-2)
model = prepared()
tune(model, loader(), falling_loss, sys.argv[1], recipe, save_every=1, resume=True)
from safetensors.torch import save_file
save_file({n: p.detach().clone() for n, p in model.named_parameters()}, sys.argv[1] + "/done")
"""


def test_killed_by_the_system_it_goes_on(tmp_path):
    def start(folder):
        here = Path(__file__).parent
        command = [sys.executable, "-c", SCRIPT, folder, here, here.parent]
        return subprocess.Popen(command)

    assert start(tmp_path / "whole").wait() == 0
    folder = tmp_path / "killed"
    process = start(folder)
    while not (folder / CHECKPOINT).exists() and process.poll() is None:
        time.sleep(0.005)
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert start(folder).wait() == 0
    a, b = load_file(tmp_path / "whole" / "done"), load_file(folder / "done")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not list(folder.glob(".partial*"))


def test_compiled_and_bf16_runs_have_the_losses_of_the_plain_one(tmp_path):
    histories = []
    for options in ({}, {"compile": True}, {"bf16": True}):
        recipe = Recipe(epochs=2, lr=1e-2, **options)
        folder = tmp_path / str(len(histories))
        histories.append(tune(prepared(), loader(), falling_loss, folder, recipe).history)
    plain, compiled, bf16 = ([h["loss"] for h in history] for history in histories)
    assert compiled == pytest.approx(plain, rel=1e-4)
    assert bf16 == pytest.approx(plain, rel=2**-6)  # bf16 has 8 bits, activations are a few deep


@pytest.mark.parametrize(("own", "used"), [(7, 7), (None, 0)])
def test_graphed_steps_pad_with_the_models_own_token(tmp_path, monkeypatch, own, used):
    """What pads without a GPU is told by test_steps: here, what it is given."""

    def stand_in(model, optimizer, loss, bf16, pad):
        raise TuningError(f"pads with {pad}")

    monkeypatch.setattr(tuning, "GraphedStep", stand_in)
    model = prepared()
    model.config.pad_token_id = own
    with pytest.raises(TuningError, match=f"pads with {used}$"):
        tune(model, loader(), falling_loss, tmp_path, Recipe(graphs=True))


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    tune(prepared(), loader(), falling_loss, tmp_path, Recipe(epochs=1))
    with pytest.raises(TuningError, match="epochs is 1, here it is 2"):
        tune(prepared(), loader(), falling_loss, tmp_path, Recipe(epochs=2), resume=True)
    (tmp_path / CHECKPOINT).write_bytes(b"broken")
    with pytest.raises(TuningError, match="no checkpoint"):
        tune(prepared(), loader(), falling_loss, tmp_path, Recipe(epochs=1), resume=True)


ROWS = [{k: v[i] for k, v in batch(rows=4, seed=s).items()} for s in range(5) for i in range(4)]


def global_order():
    return torch.utils.data.DataLoader(ROWS, batch_size=4, shuffle=True)


def own_order():
    generator = torch.Generator().manual_seed(7)
    return torch.utils.data.DataLoader(ROWS, batch_size=4, shuffle=True, generator=generator)


def in_workers():
    return torch.utils.data.DataLoader(ROWS, batch_size=4, shuffle=True, num_workers=1)


class Noisy:
    """Not torch's and not ours: draws with three global generators, as augmentations do."""

    def __len__(self):
        return 5

    def __iter__(self):
        for i in torch.randperm(5).tolist():
            one = batch(seed=i)
            one["input_ids"][0, 0] = random.randint(3, 63)
            one["input_ids"][1, 0] = int(np.random.randint(3, 63))
            yield one


def broken_off(make, stop):
    """A loader as ``make`` makes, of which the run is killed at the batch of number ``stop``."""
    inner = make()

    class Broken:
        given = 0

        def __len__(self):
            return len(inner)

        def __iter__(self):
            for item in inner:
                if Broken.given == stop:
                    raise Killed
                Broken.given += 1
                yield item

    found = Broken()
    found.inner = inner  # where torch's samplers are found
    return found


@pytest.mark.parametrize("stop", [3, 5, 7])
@pytest.mark.parametrize("make", [global_order, own_order, in_workers, Noisy])
def test_resumed_with_other_loaders_and_dropout_to_the_bit(tmp_path, make, stop):
    recipe = Recipe(epochs=2, lr=1e-2)
    whole, model = prepared(), prepared()
    assert whole.config.hidden_dropout_prob > 0
    tune(whole, make(), falling_loss, tmp_path / "whole", recipe)
    with pytest.raises(Killed):
        tune(model, broken_off(make, stop), falling_loss, tmp_path / "a", recipe, save_every=1)
    torch.manual_seed(99)
    random.seed(99)
    model = prepared()
    tune(model, make(), falling_loss, tmp_path / "a", recipe, resume=True)
    for a, b in zip(whole.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_half_precision_run_resumes_with_its_fp32_masters(tmp_path):
    """At this rate a step is below the spacing of bf16: only the masters hold it."""
    recipe = Recipe(epochs=2, lr=1e-5)
    whole, model = prepared().bfloat16(), prepared().bfloat16()
    tune(whole, global_order(), falling_loss, tmp_path / "whole", recipe)
    broken = broken_off(global_order, 7)
    with pytest.raises(Killed):
        tune(model, broken, falling_loss, tmp_path / "a", recipe, save_every=1)
    model = prepared().bfloat16()
    tune(model, global_order(), falling_loss, tmp_path / "a", recipe, resume=True)
    ends = [load_file(tmp_path / name / CHECKPOINT) for name in ("whole", "a")]
    masters = [k for k in ends[0] if k.startswith("optimizer/master/")]
    assert len(masters) == 4
    for key in masters:
        assert torch.equal(ends[0][key], ends[1][key])
        assert not torch.equal(ends[0][key], ends[0][key].bfloat16().float())


def test_the_loader_disturbs_no_random_state_but_its_own(tmp_path):
    states = torch.get_rng_state(), random.getstate()
    passes = Passes(Noisy(), seed=3)
    first = [digest_of(b) for b in passes.epoch(0)]
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert first == [digest_of(b) for b in passes.epoch(0)]
    assert first != [digest_of(b) for b in passes.epoch(1)]
    assert first != [digest_of(b) for b in Passes(Noisy(), seed=4).epoch(0)]


def other_model():
    model = prepared()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 0] += 1e-3
    return model


def other_dropout():
    model = prepared()
    model.config.hidden_dropout_prob = 0.5
    return model


def last_label_turned():
    batches = loader()
    batches[-1]["labels"][-1] = 1 - batches[-1]["labels"][-1]
    return batches


@pytest.mark.parametrize("epochs", [1, 2])
def test_another_model_or_other_data_of_the_same_shapes_is_refused(tmp_path, epochs):
    recipe = Recipe(epochs=epochs)
    tune(prepared(), loader(), falling_loss, tmp_path, recipe)
    before = (tmp_path / CHECKPOINT).read_bytes()
    for make, data, message in (
        (other_model, loader(), "its model is another one"),
        (other_dropout, loader(), "its model is another one"),
        (prepared, last_label_turned(), f"other data: .* the batches that epoch {epochs} had"),
        (prepared, loader()[::-1], "other data"),
    ):
        model = make()
        values = {n: p.clone() for n, p in model.named_parameters()}
        with pytest.raises(TuningError, match=message):
            tune(model, data, falling_loss, tmp_path, recipe, resume=True)
        assert all(torch.equal(p, values[n]) for n, p in model.named_parameters())
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    tune(prepared(), loader(), falling_loss, tmp_path, recipe, resume=True)


def test_on_another_machine_it_goes_on_and_says_so(tmp_path, monkeypatch):
    tune(prepared(), loader(), falling_loss, tmp_path, Recipe(epochs=1))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 977)
    said = r"threads \d+ and goes on with 977.*no longer the same"
    with pytest.warns(BeftWarning, match=said) as warned:
        tune(prepared(), loader(), falling_loss, tmp_path, Recipe(epochs=1), resume=True)
    assert [w.filename for w in warned if w.category is BeftWarning] == [__file__]


def test_no_flipped_bit_of_a_checkpoint_passes(tmp_path):
    tune(prepared(), loader(), falling_loss, tmp_path, Recipe(epochs=1))
    data, model = (tmp_path / CHECKPOINT).read_bytes(), prepared()
    for place in random.Random(0).sample(range(8 * len(data)), 25) + [8 * i for i in range(25)]:
        bad = bytearray(data)
        bad[place // 8] ^= 1 << place % 8
        (tmp_path / CHECKPOINT).write_bytes(bad)
        with pytest.raises(TuningError):
            tune(model, loader(), falling_loss, tmp_path, Recipe(epochs=1), resume=True)


class Endless:
    """Gives up itself where nobody else does."""

    def __len__(self):
        return 4

    def __iter__(self):
        yield from loader()
        raise AssertionError("asked for more after the fifth batch")


def test_a_loader_must_give_what_its_length_says(tmp_path):
    class Lying(list):
        def __len__(self):
            return 4

    with pytest.raises(TuningError, match=r"more batches in epoch 1 than its length says \(4\)"):
        tune(prepared(), Lying(loader()), falling_loss, tmp_path, RECIPE)
    with pytest.raises(TuningError, match="more batches"):
        tune(prepared(), Endless(), falling_loss, tmp_path, RECIPE)
    with pytest.raises(TuningError, match="fewer batches"):
        tune(prepared(), Lying(loader()[:2]), falling_loss, tmp_path, RECIPE)
    with pytest.raises(TuningError, match="with a length"):
        tune(prepared(), iter(loader()), falling_loss, tmp_path, RECIPE)


@pytest.mark.parametrize("reached", [(0.9, 0.5, 0.1), (0.9, 0.9, 0.9)], ids=["best", "equal"])
def test_the_first_best_epoch_is_put_back_and_losses_are_of_their_epoch(tmp_path, reached):
    """Oracle: the same run of one epoch; and the mean of the losses that it saw."""
    seen, metrics = [], iter(reached)

    def watched(model, inputs):
        loss = model(**inputs).loss
        seen.append(float(loss.detach()))
        return loss

    best, one = prepared(), prepared()
    recipe = Recipe(epochs=3, lr=1e-2, decay=False, warmup=0.0)
    progress = tune(best, loader(), lambda _: next(metrics), tmp_path / "a", recipe, loss=watched)
    for epoch, record in enumerate(progress.history):
        mean = sum(seen[5 * epoch : 5 * epoch + 5]) / 5
        assert record["loss"] == pytest.approx(mean, rel=1e-6)
        assert record["step"] == 5 * epoch + 5 and record["accuracy"] == reached[epoch]
    short = Recipe(epochs=1, lr=1e-2, decay=False, warmup=0.0)
    tune(one, loader(), lambda _: 0.9, tmp_path / "b", short)
    for a, b in zip(best.parameters(), one.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_loader_judges_by_its_loss_and_leaves_the_mode_alone(tmp_path):
    """Oracle: the mean over rows, of batches that differ in size, written out."""
    held_out = [batch(seed=7), {k: v[:2] for k, v in batch(seed=8).items()}]
    model, states = prepared(), []

    def watched(own, inputs):
        states.append((own.training, {n: p.detach().clone() for n, p in own.named_parameters()}))
        return own(**inputs).loss

    recipe = Recipe(epochs=4, lr=0.3, decay=False)
    run = tune(model, loader(), held_out, tmp_path, recipe, loss=watched)
    ends, oracle = [states[i + 1] for i in range(4, 28, 7)], prepared()
    for (training, state), record in zip(ends, run.history, strict=True):
        oracle.load_state_dict(state, strict=False)
        sums = [len(b["labels"]) * float(oracle(**b).loss.detach()) for b in held_out]
        rows = sum(len(b["labels"]) for b in held_out)
        assert record["validation_loss"] == pytest.approx(sum(sums) / rows, rel=1e-5)
        assert not training and "accuracy" not in record
    losses = [record["validation_loss"] for record in run.history]
    best = losses.index(min(losses))
    assert 0 < best < 3 or min(losses) != losses[-1], "no test of the best epoch"
    for name, p in model.named_parameters():
        assert torch.equal(p, ends[best][1][name])
    assert model.training
    log = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in log] == run.history


def test_a_loss_of_ones_own_says_how_much_a_batch_counts():
    """Losses of examples, and a loss with its divisor, are means over what they count."""
    batches = [batch(seed=7), {k: v[:2] for k, v in batch(seed=8).items()}]
    rows, numbers = [len(b["labels"]) for b in batches], iter([1.0, 4.0])
    model = prepared()

    def of_examples(_, inputs):
        return torch.full((len(inputs["labels"]),), next(numbers))

    assert mean_loss(model, batches, of_examples) == (rows[0] + 4 * rows[1]) / sum(rows)
    pairs = iter([(torch.tensor(1.0), 1.0), (torch.tensor(4.0), torch.tensor(5))])
    assert mean_loss(model, batches, lambda *_: next(pairs)) == 21 / 6


def test_without_a_folder_nothing_is_written_and_without_a_judge_the_last_epoch_stays(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    plain, judged = prepared(), prepared()
    run = tune(plain, loader(), recipe=RECIPE, save_every=1)
    assert [list(r) for r in run.history] == 3 * [["epoch", "step", "loss"]]
    rising = iter((0.1, 0.2, 0.3))
    tune(judged, loader(), lambda _: next(rising), recipe=RECIPE)
    for a, b in zip(plain.parameters(), judged.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not list(tmp_path.iterdir())
    with pytest.raises(TuningError, match="resume=True needs the folder"):
        tune(prepared(), loader(), resume=True)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(TuningError, match="not finite at step"):
        tune(
            prepared(), loader(), falling_loss, tmp_path, Recipe(epochs=9, lr=1e30, max_grad_norm=0)
        )


def test_one_step_is_a_run(tmp_path):
    done = tune(prepared(), loader()[:1], falling_loss, tmp_path, Recipe(epochs=1))
    assert done.step == 1 and [r["epoch"] for r in done.history] == [1]


def test_the_recipe_by_default():
    """A checkpoint names its recipe: with other defaults, yesterday's runs could not go on."""
    stated = {"epochs": 10, "lr": 1e-3, "warmup": 0.06, "weight_decay": 0.0, "max_grad_norm": 1.0}
    switches = {"seed": 0, "bf16": False, "compile": False, "graphs": False, "decay": True}
    switches |= {"deterministic": False, "parts": 1}
    assert asdict(Recipe()) == stated | switches


def test_nothing_to_train(tmp_path):
    with pytest.raises(TuningError, match="save_every must be at least 1"):
        tune(prepared(), loader(), falling_loss, tmp_path, save_every=0)
    with pytest.raises(TuningError, match="prepare"):
        tune(tiny("bert").requires_grad_(False), loader(), falling_loss, tmp_path)
    with pytest.raises(TuningError, match="empty"):
        tune(prepared(), [], falling_loss, tmp_path)


def test_the_schedule_rises_then_falls_to_zero_behind_the_last_step():
    factors = [rate_factor(i, 10, 0.3, True) for i in range(10)]
    assert factors[2:] == [pytest.approx(k / 8) for k in range(8, 0, -1)]
    assert factors[:3] == [1 / 3, 2 / 3, 1.0]
    assert factors[3:] == sorted(factors[3:], reverse=True) and factors[-1] > 0
    assert rate_factor(0, 1, 0.06, True) == rate_factor(9, 10, 0.0, False) == 1.0
    for warmup in (-0.1, 1.1, float("nan")):
        with pytest.raises(OptimizerError, match=f"within 0 and 1, but is {warmup}"):
            rate_factor(0, 10, warmup, True)
