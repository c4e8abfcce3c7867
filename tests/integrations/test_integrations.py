"""transformers.Trainer and an accelerate loop train to the losses of our own loop."""

import pytest
import torch
from conftest import batch, tiny
from safetensors.torch import load_file

from beft_ext import load_adapter, prepare
from beft_ext.training.optim import BiasAdamW, rate_factor
from beft_ext.training.tuning import Recipe, tune

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
STEPS, LR = 12, 1e-2


def prepared():
    model = tiny("bert").requires_grad_(False)
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    for name, p in model.named_parameters():
        p.requires_grad_("value.bias" in name or name.startswith("classifier"))
    return model


ROWS = [{k: v[i] for k, v in batch(rows=4, seed=s).items()} for s in range(STEPS) for i in range(4)]


def batches():
    return [
        {k: torch.stack([r[k] for r in ROWS[4 * s : 4 * s + 4]]) for k in ROWS[0]}
        for s in range(STEPS)
    ]


def schedule(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: rate_factor(i, STEPS, 0.06, True))


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    model = prepared()
    folder = tmp_path_factory.mktemp("ours")
    tune(model, batches(), lambda m: 1.0, folder, Recipe(epochs=1, lr=LR))
    return {n: p.detach() for n, p in model.named_parameters()}


def agree(model, ours):
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), ours[name], rtol=1e-4, atol=1e-6)


def trainer(model, folder, **options):
    import transformers

    arguments = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        num_train_epochs=1,
        max_grad_norm=1.0,
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        **{"save_strategy": "no", "report_to": "none"} | options,
    )
    optimizer = BiasAdamW(model, lr=LR)

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(ROWS)

    return InOrder(
        model, arguments, train_dataset=ROWS, optimizers=(optimizer, schedule(optimizer))
    )


def test_the_trainer_agrees_and_logs_the_scores(ours, tmp_path):
    from beft_ext.integrations.trainer import log_scores

    model = prepared()
    run = trainer(model, tmp_path)
    log_scores(run)
    run.train()
    agree(model, ours)
    logged = [r for r in run.state.log_history if "loss" in r]
    assert len(logged) == STEPS


def test_tensorboard_shows_the_scores(tmp_path, monkeypatch):
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed",
    )
    from beft_ext.integrations.trainer import log_scores, term_scores

    model = tiny("bert")
    prepare(model, ("query", "value"))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    run = trainer(model, tmp_path, report_to="tensorboard")
    log_scores(run)
    run.train()
    (file,) = tmp_path.rglob("events.out.tfevents*")
    written = events.EventAccumulator(str(file)).Reload()
    for name, value in term_scores(run.optimizer.optimizer).items():
        shown = written.Scalars(f"train/{name}")
        assert len(shown) >= STEPS and shown[-1].value == pytest.approx(value)
    assert "train/beft/value" in written.Tags()["scalars"]


def test_several_biases_of_a_layer_are_logged_as_their_term_and_other_names_as_none():
    from beft_ext.integrations.trainer import term_scores

    names = ["0.mlp_up", "0.mlp_up.1", "1.mlp_up", "0.weight", "0.bias.1"]
    values = [torch.nn.Parameter(torch.ones(4)) for _ in names]
    optimizer = BiasAdamW(list(zip(names, values, strict=True)), lr=1e-2)
    for number, value in enumerate(values[:2]):
        value.grad = torch.full((4,), number + 1.0)
    optimizer.step()
    found, each = term_scores(optimizer), optimizer.scores()
    assert set(found) == {"beft/mlp_up", "magnitude/mlp_up"}
    mean = sum(each[n].magnitude for n in names[:3]) / 3
    assert found["magnitude/mlp_up"] == pytest.approx(mean) and mean > 0


def test_the_trainer_resumes_in_the_middle_of_an_epoch(ours, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 5}
    whole = prepared()
    trainer(whole, tmp_path, **options).train()
    resumed = prepared()
    trainer(resumed, tmp_path, **options).train(str(tmp_path / "checkpoint-5"))
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_half_precision_trainer_resumes_with_its_fp32_masters(tmp_path):
    """With dropout, torch's own shuffling, and steps below the spacing of bf16."""
    import transformers

    def begun():
        model = tiny("bert").bfloat16()
        prepare(model, "value")
        assert model.config.hidden_dropout_prob > 0
        optimizer = BiasAdamW(model, lr=1e-5)
        options = {"save_steps": 5, "num_train_epochs": 2, "max_grad_norm": 0.0}
        options |= {"disable_tqdm": True, "use_cpu": True, "report_to": "none"}
        arguments = transformers.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=8, save_strategy="steps", **options
        )
        both = (optimizer, schedule(optimizer))
        return transformers.Trainer(model, arguments, train_dataset=ROWS, optimizers=both)

    whole, resumed = begun(), begun()
    whole.train()
    resumed.train(str(tmp_path / "checkpoint-5"))
    states = [run.optimizer.optimizer.state.values() for run in (whole, resumed)]
    for a, b in zip(*states, strict=True):
        assert torch.equal(a["master"], b["master"])
        assert not torch.equal(a["master"], a["master"].bfloat16().float())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_accelerate_agrees(ours, accumulation):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = prepared()
    optimizer = BiasAdamW(model, lr=LR)
    prepared_model, optimizer, steps = accelerator.prepare(model, optimizer, schedule(optimizer))
    for inputs in batches():
        for part in range(accumulation):
            rows = slice(part * 4 // accumulation, (part + 1) * 4 // accumulation)
            with accelerator.accumulate(prepared_model):
                loss = prepared_model(**{k: v[rows] for k, v in inputs.items()}).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                steps.step()
                optimizer.zero_grad()
    agree(model, ours)


def test_accelerate_in_bf16_learns():
    accelerate.state.AcceleratorState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = prepared()
    model_, optimizer = accelerator.prepare(model, BiasAdamW(model, lr=LR, max_grad_norm=1.0))
    losses = []
    for _ in range(3):
        for inputs in batches()[:4]:
            loss = model_(**inputs).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    accelerate.state.AcceleratorState._reset_state()
    assert sum(losses[-4:]) < sum(losses[:4])


def test_scores_reach_the_loggers_that_come_before(tmp_path):
    import transformers

    from beft_ext.integrations.trainer import IntegrationError, log_scores

    seen = []

    class Logger(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            seen.append(dict(logs))

    model = prepared()
    run = trainer(model, tmp_path)
    named = [(f"{i}.value", p) for i, p in enumerate(model.parameters()) if p.requires_grad]
    run.optimizer = BiasAdamW(named, lr=LR)
    run.lr_scheduler = schedule(run.optimizer)
    run.add_callback(Logger())
    log_scores(run)
    run.train()
    assert 0 < seen[0]["beft/value"] < 1 and seen[0]["magnitude/value"] > 0
    run.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(IntegrationError, match="BiasAdamW"):
        log_scores(run)


def test_the_adapter_lies_beside_each_checkpoint_with_the_added_biases(tmp_path):
    from beft_ext.integrations.trainer import AdapterCallback

    model = tiny("llama")
    prepare(model, "value")
    run = trainer(model, tmp_path, save_strategy="steps", save_steps=5)
    run.add_callback(AdapterCallback())
    run.train()
    model.eval()
    checkpoints = sorted(p.name for p in tmp_path.glob("checkpoint-*"))
    assert "checkpoint-12" in checkpoints and len(checkpoints) == 3
    assert all((tmp_path / c / "adapter" / "adapter_config.json").is_file() for c in checkpoints)
    again, inputs = tiny("llama"), batch()
    load_adapter(again, tmp_path / "checkpoint-12" / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)
    assert again.model.layers[0].self_attn.v_proj.bias.abs().min() > 0


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_trainer_resumes_from_a_checkpoint_with_its_adapter(name, tmp_path):
    """To the bits of a run that was not stopped, from the Trainer's files; and the adapter alone
    is what that checkpoint's model was, to train on in another run."""
    from beft_ext.adapters.contents import FILES
    from beft_ext.integrations.trainer import AdapterCallback

    def begun(folder, **options):
        model = tiny(name)
        prepare(model, "value")
        options |= {"save_strategy": "steps", "save_steps": 5}
        run = trainer(model, folder, **options)
        run.add_callback(AdapterCallback())
        return run, model

    run, whole = begun(tmp_path / "whole")
    run.train()
    checkpoint = tmp_path / "whole" / "checkpoint-5"
    run, resumed = begun(tmp_path / "resumed")
    run.train(str(checkpoint))
    assert not (tmp_path / "resumed" / "checkpoint-5").exists()
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    for file in FILES:
        last = [tmp_path / n / "checkpoint-12" / "adapter" / file for n in ("whole", "resumed")]
        assert last[0].read_bytes() == last[1].read_bytes()
    again, saved = tiny(name), load_file(checkpoint / "model.safetensors")
    load_adapter(again, checkpoint / "adapter", trainable=True)
    for key, value in saved.items():
        torch.testing.assert_close(again.state_dict()[key], value)
