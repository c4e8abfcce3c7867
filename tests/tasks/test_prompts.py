"""Prompts: scores of options and generated text in batches are those of one at a time."""

import pytest
import torch
import transformers as hf
from conftest import SIZES

from beft_ext import select
from beft_ext.tasks import DataError, PromptObjective, Task
from beft_ext.tasks.decoding import shared_prompt_scores
from beft_ext.tasks.prompts import option_scores

CHOICE = Task(text="{q}", kind="choice", prompt="{q} ", options="c", label="y")
VERBAL = Task(text="{q}", prompt="{q} It was", options=(" terrible", " great"))
ANSWER = Task(text="{q}", kind="generation", prompt="{q}:", answers="a")
CHOICES = [
    {"q": "hello there my", "c": ["friend", "old foe", "x"], "y": 0},
    {"q": "a", "c": ["b", "some longer option"], "y": [1]},
    {"q": "who are you to", "c": ["x y", "z", "Yes"], "y": 2},
]
SIZE = SIZES | {"vocab_size": 270}
DECODERS = {
    "opt": lambda: hf.OPTConfig(**SIZE, ffn_dim=48, word_embed_proj_dim=32),
    "gpt2": lambda: hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=270),
    "llama": lambda: hf.LlamaConfig(**SIZE, intermediate_size=48, num_key_value_heads=2),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**SIZE, intermediate_size=48),
    "bloom": lambda: hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=270),
}


with torch.device("meta"):
    DECODER = hf.OPTForCausalLM(DECODERS["opt"]())


@pytest.fixture(params=DECODERS)
def model(request):
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(DECODERS[request.param]()).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_decoder):
    return hf.AutoTokenizer.from_pretrained(tiny_decoder)


def objective(task, tokenizer, **options):
    return PromptObjective(task, tokenizer, DECODER, **options)


@torch.no_grad()
def one_by_one(model, prompt, options):
    """Mean log-probability of each option's tokens, a forward an option."""
    scores = []
    for option in options:
        ids = torch.tensor([prompt + option])
        logs = model(ids).logits[0].double().log_softmax(-1)
        n = len(option)
        scores.append(float(logs[-n - 1 : -1].gather(-1, ids[0, -n:, None]).mean()))
    return scores


def test_scores_of_options_are_those_of_one_at_a_time(model, tokenizer):
    asked = objective(CHOICE, tokenizer)
    examples = CHOICE.examples(CHOICES, "")
    batches = asked.held_out(examples, 2)
    for plan, batch in zip(batches.plan(), batches, strict=True):
        prompts = [batches.rows[i].fields for i in plan]
        expected = [one_by_one(model, p.prompt, p.options) for p in prompts]
        with torch.no_grad():
            assert option_scores(model, batch).tolist() == [
                pytest.approx(e, abs=1e-5) for e in expected
            ]
            pairs = [(p.prompt, p.options) for p in prompts]
            found = shared_prompt_scores(model, pairs, pad=1)
        assert found == [pytest.approx(e, abs=1e-5) for e in expected]
    choices = asked.predict(model, batches)
    rows = [batches.rows[i].fields for i in range(3)]
    expected = [one_by_one(model, r.prompt, r.options) for r in rows]
    assert choices == [e.index(max(e)) for e in expected]


def test_options_of_one_token_share_one_row(model, tokenizer):
    asked = objective(VERBAL, tokenizer)
    rows = [{"q": q, "label": y} for q, y in (("fine film", 1), ("bad", 0), ("so so", 1))]
    batches = asked.held_out(VERBAL.examples(rows, ""), 3)
    (batch,) = batches
    assert batch["input_ids"].shape[:2] == (3, 1) and batch["options"].shape == (3, 2, 1)
    prompts = [batches.rows[i].fields for i in batches.plan()[0]]
    expected = torch.tensor([one_by_one(model, p.prompt, p.options) for p in prompts])
    with torch.no_grad():
        assert torch.allclose(option_scores(model, batch), expected, atol=1e-5)
        loss = torch.nn.functional.cross_entropy(expected, batch["labels"])
        assert float(asked.loss(model, batch)) == pytest.approx(float(loss), abs=1e-5)


def test_text_is_generated_as_one_at_a_time(model, tokenizer):
    asked = objective(ANSWER, tokenizer, new_tokens=6)
    rows = [{"q": q, "a": "me"} for q in ("who is it", "b", "where")]
    together = asked.held_out(ANSWER.examples(rows, ""), 3)
    alone = asked.held_out(ANSWER.examples(rows, ""), 1)
    assert asked.predict(model, together) == asked.predict(model, alone)


def test_only_the_answer_is_learnt(tokenizer):
    asked = objective(ANSWER, tokenizer)
    rows = [{"q": "who", "a": ["Yes", "No"]}, {"q": "where is", "a": "x"}]
    for batch in asked.training(ANSWER.examples(rows, ""), 2, seed=0):
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            text = tokenizer.decode(ids[labels != -100])
            assert text in (" Yes\n", " x\n")


def test_examples_stand_before_the_prompt(tokenizer):
    shots = VERBAL.examples([{"q": "bad", "label": 0}, {"q": "good", "label": 1}], "")
    asked = objective(VERBAL, tokenizer, shots=shots)
    batches = asked.held_out(VERBAL.examples([{"q": "fine", "label": 1}], ""), 1)
    text = tokenizer.decode(batches.rows[0].fields.prompt)
    assert text == "bad It was terrible\n\ngood It was great\n\nfine It was"


def test_what_is_too_long_is_counted_or_refused(tokenizer):
    long = {"q": "q" * 50, "a": "a"}
    asked = objective(ANSWER, tokenizer, max_length=40)
    batches = asked.training(ANSWER.examples([long], ""), 1, seed=0)
    assert batches.rows[0].length <= 40 and next(iter(batches))["input_ids"].shape[1] <= 40
    assert any("shortened" in what for what in asked.notes)
    never = [{"q": "q", "a": "a" * 60}, {"q": "q", "a": "a"}]
    assert len(asked.training(ANSWER.examples(never, ""), 1, seed=0).rows) == 1
    assert asked.notes["examples left out: the answer is longer than the model's input"] == 1
    with pytest.raises(DataError, match="no example is left"):
        asked.training(ANSWER.examples(never[:1], ""), 1, seed=0)
    choice = objective(CHOICE, tokenizer, max_length=10)
    with pytest.raises(DataError, match="option 'some longer option' is longer"):
        choice.held_out(CHOICE.examples(CHOICES, ""), 2)


def test_per_example_statistics_of_ranked_options(tokenizer, tiny_decoder):
    """Fisher information against a loop of one example at a time."""
    model = hf.AutoModelForCausalLM.from_pretrained(tiny_decoder).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.model.decoder.dropout = 0.0
    for layer in model.model.decoder.layers:
        layer.dropout = layer.self_attn.dropout = 0.0
    task = Task(text="{q}", prompt="{q} ", options=("Yes", "No way"))
    asked = objective(task, tokenizer)
    rows = [{"q": q, "label": y} for q, y in (("fine film", 1), ("bad", 0), ("so so", 1))]
    batches = asked.training(task.examples(rows, ""), 3, seed=0)
    found = select(
        model, batches, "example_fisher", loss=asked.loss, lr=1e-9, steps=1, max_grad_norm=0.0
    )
    exact, squares = model.double(), {}
    for row in batches.rows:
        exact.zero_grad()
        asked.loss(exact, batches.collate([row])).backward()
        for layer, block in enumerate(exact.model.decoder.layers):
            grad = block.self_attn.v_proj.bias.grad
            squares[layer] = squares.get(layer, 0) + float(grad.square().mean()) / 3
    assert found.per_layer["example_fisher"]["value"] == pytest.approx(
        list(squares.values()), rel=1e-3
    )


def started(tokenizer):
    """The tokenizer with a beginning of text that it adds itself, as OPT's and LLaMA's do."""
    import copy

    from tokenizers.processors import TemplateProcessing

    found = copy.deepcopy(tokenizer)
    found.bos_token = "</s>"
    found.backend_tokenizer.post_processor = TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 0)]
    )
    return found


def test_long_prompts_keep_their_beginning_mark_and_their_end(tokenizer):
    rows = [{"q": "b" * 50 + "xyz", "label": 1}, {"q": "a", "label": 0}]
    for begun in (tokenizer, started(tokenizer)):
        asked = objective(VERBAL, begun, max_length=20)
        marks = [] if begun is tokenizer else [0]
        batches = asked.held_out(VERBAL.examples(rows, ""), 2)
        long, short = (row.fields for row in batches.rows)
        assert long.prompt[: len(marks)] == marks == short.prompt[: len(marks)]
        text = tokenizer.decode(long.prompt[len(marks) :])
        assert text.endswith("xyz It was") and set(text.removesuffix("xyz It was")) == {"b"}
        assert tokenizer.decode(short.prompt[len(marks) :]) == "a It was"
        # As long as allowed: prompt, and the one token of the option.
        assert len(long.prompt) + len(long.options[0]) == 20


def test_a_prompt_without_tokens_starts_somewhere(model, tokenizer):
    task = Task(text="{q}", kind="choice", prompt="{q}", options="c", label="y")
    rows = [{"q": q, "c": ["Yes", "No way"], "y": 0} for q in ("", "longer than that", "x")]
    asked = objective(task, tokenizer)
    batches = asked.held_out(task.examples(rows, ""), 3)
    prompts = [row.fields for row in batches.rows]
    assert prompts[0].prompt == [0]  # the end of text, which is what the tokenizer has
    expected = [one_by_one(model, p.prompt, p.options) for p in prompts]
    with torch.no_grad():
        found = option_scores(model, asked.options(batches.rows)).tolist()
        shared = shared_prompt_scores(model, [(p.prompt, p.options) for p in prompts], pad=1)
    assert found == [pytest.approx(e, abs=1e-5) for e in expected]
    assert shared == [pytest.approx(e, abs=1e-5) for e in expected]


def test_an_option_that_grows_together_with_its_prompt_keeps_its_letters(tokenizer):
    task = Task(text="{q}", prompt="{q}Y", options=("es", "ep"))
    asked = objective(task, tokenizer)
    batches = asked.held_out(task.examples([{"q": "a", "label": 1}], ""), 1)
    prompt = batches.rows[0].fields
    said = [tokenizer.decode(prompt.prompt + option) for option in prompt.options]
    assert said == ["aYes", "aYep"]


def test_a_length_without_room_for_an_answer_is_refused(tokenizer):
    asked = objective(ANSWER, started(tokenizer), max_length=2)
    with pytest.raises(DataError, match="an answer of 1 tokens is longer than the model's input"):
        asked.held_out(ANSWER.examples([{"q": "a", "a": "b"}], ""), 1)


def test_text_is_greedy_whatever_the_folder_asks_for(model, tokenizer):
    asked = objective(ANSWER, tokenizer, new_tokens=6)
    batches = asked.held_out(ANSWER.examples([{"q": "who is it", "a": "me"}], ""), 1)
    plain = asked.predict(model, batches)
    for key, value in {
        "num_beams": 3,
        "repetition_penalty": 5.0,
        "no_repeat_ngram_size": 1,
    }.items():
        setattr(model.generation_config, key, value)
    assert asked.predict(model, batches) == plain


def test_what_is_observed_of_examples_is_the_loss_before_its_mean(model, tokenizer):
    answers = [{"q": "ab", "a": "c"}, {"q": "c", "a": "da"}]
    for task, rows in ((CHOICE, CHOICES[::2]), (ANSWER, answers)):
        asked = objective(task, tokenizer)
        examples = task.examples(rows, "")
        (batch,) = asked.training(examples, 3, seed=0)
        seen = asked.observe(model, batch)
        # fp32 sums of a few log-probabilities below 10.
        torch.testing.assert_close(
            seen.losses.sum() / seen.counts.sum(), asked.loss(model, batch), rtol=1e-5, atol=0
        )
        if task is CHOICE:
            assert seen.probabilities.shape == (2, 3)
            assert torch.equal(seen.right, batch["labels"])
        else:
            assert seen.probabilities is None
            assert seen.counts.tolist() == batch["labels"].ne(-100).sum(1).tolist()
