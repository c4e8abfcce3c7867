"""audition: the right racer wins, in pairs and within its budget, and nothing else is changed."""

import json
from contextlib import contextmanager
from dataclasses import replace
from itertools import count

import pytest
import torch
from conftest import batch, tiny

import beft_ext
from beft_ext import load_adapter, prepare, restore, save_adapter, set_adapter
from beft_ext.models import state as records
from beft_ext.selection import (
    Audition,
    AuditionError,
    NoRaceError,
    Racer,
    audition,
    made_by,
    rate_of_step,
    rates_around,
    read_audition,
    terms_of,
)
from beft_ext.selection.auditioning import FIFTHS, FOLDED, JUDGING, _splits, losses_of
from beft_ext.selection.racers import Rung, paired
from beft_ext.tasks import Batches
from beft_ext.tasks.batches import Encoded
from beft_ext.training.loss import model_loss
from beft_ext.training.tuning import Recipe, tune

ROWS, SIZE = 24, 4
RECIPE = Recipe(epochs=20)


def collate(rows):
    ids = torch.tensor([r.fields for r in rows])
    return {"input_ids": ids, "labels": torch.tensor([int(r.label) for r in rows])}


def rows(n=ROWS, label=lambda i: i % 2):
    """Row i is the token of its class, several times, and ends with token i."""
    made = [Encoded([*[40 + 10 * label(i)] * 6, i % 64], label(i), 7) for i in range(n)]
    return Batches(made, collate, SIZE, seed=0)


def snapshot(model):
    named = {n: t.clone() for n, t in model.state_dict().items()}
    required = [(n, p.requires_grad, p.grad) for n, p in model.named_parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    own = [len(p._backward_hooks or {}) for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    return named, required, hooks, own, modes, dict(records._records(model))


def same(a, b):
    return a[1:] == b[1:] and a[0].keys() == b[0].keys() and all(
        torch.equal(a[0][k], b[0][k]) for k in a[0]
    )  # fmt: skip


def alone(model, ending):
    """A contender that trains the parameters whose names end so, and no head."""

    @contextmanager
    def contender():
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith(ending))
        yield model
        with torch.no_grad():
            for name, parameter in model.requires_grad_(True).named_parameters():
                parameter.copy_(before[name])

    return contender


def race(model=None, terms=("value",), rates=(1e-3, 1e-2), budget=8.0, **options):
    model = tiny("bert") if model is None else model
    contenders = {t: terms_of(model, t) for t in terms}
    return audition(contenders, rows(), rates, recipe=RECIPE, budget=budget, **options)


def test_of_a_dead_contender_and_an_absurd_rate_the_right_one_is_left():
    model = tiny("bert")
    contenders = {"dead": alone(model, "key.bias"), "mlp_up": terms_of(model, "mlp_up")}
    found = audition(contenders, rows(), (1e-1, 1e30), recipe=RECIPE, budget=40)
    assert (found.best, found.lr) == ("mlp_up", 1e-1) and found.sure > 0.95
    assert found.sure_of_contender >= found.sure
    first, *others = found.racers
    assert first.fate == "won" and first.behind == 0
    assert "diverged: " in next(r.fate for r in others if r.lr == 1e30 and r.contender == "mlp_up")
    dead = next(r for r in others if (r.contender, r.lr) == ("dead", 1e-1))
    assert dead.behind > 2 * dead.error


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("stopped", [None, 1, 7])
def test_the_model_comes_back_as_it_was(name, stopped):
    model, calls = tiny(name).train(), []
    model.score = getattr(model, "score", None)
    model.config.pad_token_id = 0
    next(iter(model.parameters())).requires_grad_(False)
    before, chance = snapshot(model), torch.get_rng_state()

    def loss(model, batch):
        calls.append(None)
        if len(calls) == stopped:
            raise KeyboardInterrupt
        return model_loss(model, batch)

    if stopped is None:
        race(model, ("query", "value"), loss=loss)
    else:
        with pytest.raises(KeyboardInterrupt):
            race(model, ("query", "value"), loss=loss)
    assert same(before, snapshot(model)) and torch.equal(chance, torch.get_rng_state())


def test_a_model_that_is_prepared_is_refused_and_stays_so():
    model = tiny("bert")
    prepare(model, "query")
    before = snapshot(model)
    with pytest.raises(Exception, match="prepared already"):
        race(model)
    assert same(before, snapshot(model))


def test_adapters_that_are_loaded_stay_loaded(tmp_path):
    model = tiny("bert")
    prepare(model, "value")
    save_adapter(model, tmp_path)
    restore(model)
    load_adapter(model, tmp_path)
    set_adapter(model, None)
    before = snapshot(model)
    race(model)
    assert same(before, snapshot(model))
    set_adapter(model, "default")


def test_the_same_seed_is_the_same_outcome_to_the_bit():
    first = race(terms=("query", "value"), rates=(1e-3, 1e-2))
    torch.manual_seed(5)
    assert race(terms=("query", "value"), rates=(1e-3, 1e-2)) == first
    assert race(terms=("query", "value"), rates=(1e-3, 1e-2), seed=1) != first


def test_the_budget_is_kept_and_the_cost_is_counted():
    cost = {"trained": 0, "judged": 0}

    def counted(what, function):
        def call(model, batch):
            cost[what] += len(batch["labels"])
            return function(model, batch)

        return call

    for budget in (6.0, 11.0):
        cost.update(trained=0, judged=0)
        found = race(
            terms=("query", "value", "mlp_up"),
            budget=budget,
            loss=counted("trained", model_loss),
            losses=counted("judged", losses_of),
        )
        epochs = (cost["trained"] + JUDGING * cost["judged"]) / ROWS
        assert found.epochs == pytest.approx(epochs) and epochs <= budget
        assert [r.racers for r in found.rungs] == [6, 3]
        assert found.rungs[1].steps >= 2 * found.rungs[0].steps
        assert [r.rows for r in found.rungs] == [ROWS // 2, ROWS]
        assert [r.rung for r in found.racers] == [2, 2, 2, 1, 1, 1]


def test_every_row_judges_once_and_trains_no_racer_that_it_judges():
    trained, judged = [], []

    def loss(model, batch):
        assert model.training
        if judged:  # the next fold
            check()
        trained.extend(batch["input_ids"][:, -1].tolist())
        return model_loss(model, batch)

    def losses(model, batch):
        assert not model.training
        judged.extend(batch["input_ids"][:, -1].tolist())
        return losses_of(model, batch)

    folds = []

    def check():
        assert not set(trained) & set(judged)
        folds.append(sorted(judged))
        trained.clear(), judged.clear()

    found = race(loss=loss, losses=losses)
    check()
    assert found.folds == 2 and len(folds) == 4  # of two racers
    assert folds[:2] == folds[2:] and sorted(folds[0] + folds[1]) == list(range(ROWS))
    assert sum(i % 2 for i in folds[0]) == len(folds[0]) // 2  # classes as they are in all rows


def test_of_many_rows_a_fifth_judges():
    contenders = {"value": terms_of(tiny("bert"), "value")}
    found = audition(contenders, rows(FOLDED + 10), (1e-2,), recipe=RECIPE, budget=1)
    assert found.folds == 1 and found.rungs[0].rows == (FOLDED + 10) // FIFTHS
    assert found.sure == 1 and found.edge is None  # without a rival, without another rate


def test_a_model_that_is_made_anew_races_as_one_in_place():
    def fresh():
        model = tiny("bert")
        prepare(model, "value")
        return model

    found = audition({"value": made_by(fresh)}, rows(), (1e-3, 1e-2), recipe=RECIPE, budget=8.0)
    assert found == race()


def test_racers_start_alike():
    """The same rows, head and dropout: at a rate of nearly zero all losses are the same."""
    seen = []

    def loss(model, batch):
        found = model_loss(model, batch)
        seen.append((batch["input_ids"].tolist(), float(found.detach())))
        return found

    found = race(terms=("query", "value"), rates=(1e-12, 2e-12), loss=loss)
    steps = found.rungs[0].steps
    runs = [seen[i : i + 2 * steps] for i in range(0, 8 * steps, 2 * steps)]
    for run in runs[1:]:
        assert [ids for ids, _ in run] == [ids for ids, _ in runs[0]]
        # At 1e-12 a bias of 0.1 does not move in fp32; the head's zeros move by 1e-12.
        assert [x for _, x in run] == pytest.approx([x for _, x in runs[0]], abs=1e-6)


def test_a_racer_trains_as_tune_would(tmp_path):
    recipe = Recipe(epochs=2, lr=1e-1, warmup=0.5)
    contenders = {"value": terms_of(tiny("bert"), "value")}
    found = audition(contenders, rows(), (1e-1,), recipe=recipe, budget=100)
    judged, rising = [], count()
    for train, held in _splits(rows().rows, seed=0):
        model = tiny("bert")
        prepare(model, "value")
        # A metric that rises: the last epoch's parameters are kept.
        tune(model, rows().part(train, 0), lambda _: next(rising), tmp_path, recipe)
        model.eval()
        with torch.no_grad():
            judged += [losses_of(model, b).double() for b in rows().part(held)]
    assert found.racers[0].loss == pytest.approx(float(torch.cat(judged).mean()), rel=1e-12)


def test_rows_of_a_group_train_together_or_judge_together():
    made = [replace(row, group=f"user {i // 5}") for i, row in enumerate(rows(60).rows)]
    for size, parts in ((60, 2), (12 * 60, 1)):
        some = [replace(r, group=f"{r.group}, {i}") for i in range(size // 60) for r in made]
        splits = _splits(some, seed=0)
        assert len(splits) == parts
        for train, held in splits:
            assert sorted(train + held) == list(range(size)) and held
            assert not {some[i].group for i in train} & {some[i].group for i in held}
    one = Batches([replace(row, group="me") for row in made], collate, SIZE)
    with pytest.raises(NoRaceError, match="4 rows at least that belong to different groups"):
        audition(ONE, one, budget=8.0)


def test_a_racer_does_not_feel_those_before_it():
    both, alone = race(rates=(1e-2, 1e-1), budget=8.0), race(rates=(1e-1,), budget=4.0)
    assert both.rungs[0].steps == alone.rungs[0].steps
    assert alone.racers[0].loss in [r.loss for r in both.racers if r.lr == 1e-1]


def test_no_racer_trains_for_longer_than_the_run_that_it_is_for():
    contenders = {"value": terms_of(tiny("bert"), "value")}
    found = audition(contenders, rows(), (1e-2,), recipe=Recipe(epochs=2), budget=1000)
    assert found.rungs[0].steps == 2 * (ROWS // 2 // SIZE)


def test_of_equals_the_smaller_rate_is_first_and_then_the_earlier_contender():
    found = race(terms=("value", "query"), losses=lambda _, b: torch.ones(len(b["labels"])))
    order = [(r.contender, r.lr) for r in found.racers]
    assert order[:2] == [("value", 1e-3), ("query", 1e-3)]
    assert found.sure < 0.5 and found.edge == "smallest"


def test_errors_are_those_of_rows_that_share_their_training():
    """Of one row left out at a time: var (1 / N + 1 / (N - 1)); Nadeau and Bengio's for parts."""
    rival, first = torch.tensor([1.0, 4.0, 2.0, 3.0]).double(), torch.zeros(4).double()
    mean, error = paired(rival, first, trained=3)
    assert mean == 2.5 and error**2 == pytest.approx((5 / 3) * (1 / 4 + 1 / 3))
    halves = (5 / 3) / 2 * (1 / 2 + 2 / 2)  # var / n (1 / J + n / trained), J = n = trained = 2
    assert paired(rival, first, trained=2)[1] ** 2 == pytest.approx(halves)


def test_how_sure_the_winner_is_counts_every_rival_or_those_of_other_contenders():
    rivals = [("a", 3e-3, 0.0, 1.0), ("b", 1e-3, 1.0, 1.0), ("c", 1e-3, 0.0, 0.0)]
    racers = [Racer(n, lr, 1, 1.0, behind, error, "") for n, lr, behind, error in rivals]
    first = Racer("a", 1e-3, 1, 1.0, 0.0, 0.0, "won")
    racers.append(Racer("d", 1e-3, 1, None, None, None, "diverged"))
    found = Audition((first, *racers), (), {"a": (1e-3, 3e-3)}, 2, 1.0, 0.0)
    normal = 0.15865525393145707  # Phi(-1)
    assert found.sure == 0.0  # 1 - 1/2 - Phi(-1) - 1/2, and no less than nothing
    assert found.sure_of_contender == pytest.approx(0.5 - normal)


def test_the_record_is_read_again(tmp_path):
    found = race(rates=(1e-2, 1e30))
    path = tmp_path / "audition.json"
    found.save(path)
    again = read_audition(path)
    assert again == found and again.record() == found.record()
    assert json.loads(path.read_text())["version"] == beft_ext.__version__
    text = str(again)
    assert "diverged" in text and "'value' won at 0.01 (the smallest of its rates)" in text
    whole = path.read_text()
    for damage in ("", "[]", '{"racers": 1}', whole.replace('"folds": 2', '"folds": 3')):
        path.write_text(damage)
        with pytest.raises(AuditionError, match=r"audition\.json"):
            read_audition(path)
    with pytest.raises(AuditionError, match="not an audition's record"):
        Audition.of({})


def test_rates_lie_around_their_center():
    assert rates_around() == (1e-3 / 3, 1e-3, 3e-3)
    assert rates_around(2e-5) == pytest.approx((1e-5, 2e-5, 6e-5))
    assert rates_around(1.0) == (0.1,)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(AuditionError, match="positive number"):
            rates_around(wrong)


NAN = float("nan")
ONE = {"value": alone(tiny("bert"), "value.bias")}


@pytest.mark.parametrize(
    ("contenders", "data", "rates", "options", "message"),
    [
        ({}, rows(), None, {}, "no contender"),
        (ONE, rows(1), None, {}, "needs 4 rows at least, but there are 1"),
        (ONE, rows(label=lambda _: 1), None, {}, "every row has the label 1: there is nothing"),
        (ONE, rows(), (1e-2, 1e-3), {}, "numbers that rise, but are 0.01, 0.001"),
        (ONE, rows(), (1e-2, 1e-2), {}, "rise"),
        (ONE, rows(), (1e-2, NAN), {}, "rise, but are 0.01, nan"),
        (ONE, rows(), (0.0, 1e-2), {}, "positive"),
        (ONE, rows(), (), {}, "but are none"),
        (ONE, rows(), {"query": (1e-3,)}, {}, "the same names, and 'query' is not"),
        (ONE, rows(), None, {"budget": 0.5}, "budget of 0.5 epochs of 24 rows is too small for 3"),
        (ONE, rows(), None, {"budget": NAN}, "budget must be a positive number"),
        (ONE, rows(), (1e30, 1e31), {}, "every racer diverged .* smaller rates"),
        ({"x": alone(tiny("bert"), "nothing")}, rows(), None, {}, "'x' trains nothing"),
        (ONE, rows(), None, {"losses": model_loss}, r"shape \(\) for"),
        (ONE, rows(), None, {"losses": lambda _, b: b["labels"] * NAN}, "every racer diverged"),
    ],
)
def test_bad_input_is_one_sentence(contenders, data, rates, options, message):
    with pytest.raises(AuditionError, match=message) as caught:
        audition(contenders, data, rates, **{"budget": 8.0, "recipe": RECIPE} | options)
    assert "\n" not in str(caught.value)


def test_the_least_budget_that_is_named_suffices():
    with pytest.raises(AuditionError, match="too small") as caught:
        race(budget=0.01)
    least = float(str(caught.value).rpartition("give ")[2].split()[0])
    assert race(budget=least).epochs <= least


def test_losses_come_from_the_models_own_loss():
    model, data = tiny("bert"), batch()
    with torch.no_grad():
        torch.testing.assert_close(losses_of(model, data).mean(), model(**data).loss)


@pytest.mark.parametrize(
    ("behind", "error", "rate"), [(0.1, 0.2, 1e-3), (0.1, 0.1, 1e-3), (0.3, 0.2, 3e-3)]
)
def test_the_middle_rate_trains_unless_it_is_clearly_behind(behind, error, rate):
    racers = (
        Racer("value", 3e-3, 1, 0.5, 0.0, 0.0, "won"),
        Racer("value", 1e-3, 1, 0.5 + behind, behind, error, "raced to the end"),
        Racer("value", 3e-4, 1, None, None, None, "diverged"),
    )
    race = Audition(racers, (Rung(3, 1, 4, 1.0),), {"value": (3e-4, 1e-3, 3e-3)}, 2, 1.0, 0.0)
    assert race.lr == 3e-3 and race.rate == rate
    assert f"train at {rate:.2g}" in race.summary


def test_a_first_rate_is_a_tenth_of_the_step_within_bounds():
    assert rate_of_step(2e-2) == pytest.approx(2e-3)
    assert rate_of_step(5.0) == 1e-2 and rate_of_step(0.0) == 1e-4
