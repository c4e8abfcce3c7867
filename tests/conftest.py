"""Tiny random models of each family, made on the spot: no hub, no files."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
MLP = {"intermediate_size": 48}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 64}
ROPE = {"max_position_embeddings": 64, "pad_token_id": 0}
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}

CONFIGS = {
    "bert": lambda: hf.BertConfig(**SIZES, **MLP),
    "roberta": lambda: hf.RobertaConfig(**SIZES, **MLP, max_position_embeddings=64),
    "distilbert": lambda: hf.DistilBertConfig(**DISTIL),
    "electra": lambda: hf.ElectraConfig(**SIZES, **MLP, embedding_size=16),
    "albert": lambda: hf.AlbertConfig(**SIZES, **MLP, embedding_size=16),
    "deberta-v2": lambda: hf.DebertaV2Config(**SIZES, **MLP, **RELATIVE),
    "opt": lambda: hf.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, **ROPE),
    "gpt2": lambda: hf.GPT2Config(**GPT2, pad_token_id=0),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**SIZES, **MLP, **ROPE),
    "qwen2": lambda: hf.Qwen2Config(**SIZES, **MLP, **ROPE, num_key_value_heads=2),
}

GQA = {"num_key_value_heads": 2, "pad_token_id": 0}
GPT_NEO = {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4}
T5 = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8, "vocab_size": 64}

# No bias in the value projection.
BIAS_FREE = {
    "llama": lambda: hf.LlamaConfig(**SIZES, **MLP, **GQA),
    "mistral": lambda: hf.MistralConfig(**SIZES, **MLP, **GQA),
    "gemma": lambda: hf.GemmaConfig(**SIZES, **MLP, **GQA, head_dim=8),
    "gptj": lambda: hf.GPTJConfig(**GPT2, rotary_dim=4, pad_token_id=0),
    "gpt-neo": lambda: hf.GPTNeoConfig(
        hidden_size=32, num_heads=4, vocab_size=64, **GPT_NEO, pad_token_id=0
    ),
    "t5": lambda: hf.T5Config(**T5, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1),
}

# No bias, and two projections in one: query, key and value; gate and up.
FUSED = {"phi3": lambda: hf.Phi3Config(**SIZES, **MLP, **GQA, eos_token_id=1)}


def tiny(name: str, seed: int = 0) -> torch.nn.Module:
    """A two-class sequence classifier in eval mode whose biases are all non-zero."""
    torch.manual_seed(seed)
    config = (CONFIGS | BIAS_FREE | FUSED)[name]()
    model = hf.AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def batch(rows: int = 4, tokens: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (rows, tokens), generator=generator, device="cpu")
    mask = torch.ones_like(ids)
    mask[0, tokens // 2 :] = 0
    ids[0, tokens // 2 :] = 0
    labels = torch.randint(0, 2, (rows,), generator=generator, device="cpu")
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def inputs(model):
    """T5 classifies at the end token, of which each row must have one."""
    data = batch()
    if model.config.model_type == "t5":
        data["attention_mask"] = torch.ones_like(data["input_ids"])
        data["input_ids"] = data["input_ids"].clamp(min=3)
        data["input_ids"][:, -1] = 1
    return data


def train(model, steps=3, lr=1e-2):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    model.train()
    for seed in range(steps):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        model(**inputs(model)).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    model.eval()


def values(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


def logits(model):
    with torch.no_grad():
        return model(**inputs(model)).logits


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.fixture(params=CONFIGS)
def family(request):
    return request.param


@pytest.fixture(params=BIAS_FREE)
def bias_free_family(request):
    return request.param


@pytest.fixture
def benchmarks_on_the_path(monkeypatch):
    """The scripts of benchmarks/ can be imported, and are forgotten afterwards."""
    root = Path(__file__).resolve().parents[1] / "benchmarks"
    folders = [root, root / "guard"]
    for folder in folders:
        monkeypatch.syspath_prepend(str(folder))
    yield
    for name in [p.stem for folder in folders for p in folder.glob("*.py")]:
        sys.modules.pop(name, None)


def free_port():
    """Of this machine, as text."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


@pytest.fixture(scope="session")
def launch():
    """Starts the processes of one job, without a launcher: what each prints and its exit code are
    its own."""

    def run(size, *arguments, seconds=170):
        """Exit codes, and what each rank printed to stdout and stderr."""
        common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
        common |= {"OMP_NUM_THREADS": "1", "BEFT_RANK_TIMEOUT": "100"}
        ranks = [
            subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]
        try:
            said = [process.communicate(timeout=seconds) for process in ranks]
        finally:
            for process in ranks:
                process.kill()
        return [process.returncode for process in ranks], said

    return run


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny encoder with a tokenizer of letters, saved as transformers saves a model."""
    import tokenizers

    folder = tmp_path_factory.mktemp("tiny")
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{c}" for c in letters)]
    pieces = tokenizers.BertWordPieceTokenizer({t: i for i, t in enumerate(tokens)})
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    special |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    hf.PreTrainedTokenizerFast(tokenizer_object=pieces._tokenizer, **special).save_pretrained(
        folder
    )
    torch.manual_seed(0)
    model = hf.BertModel(hf.BertConfig(**SIZES, **MLP, max_position_embeddings=160))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_decoder(tmp_path_factory):
    """A tiny OPT with a tokenizer of bytes, saved as transformers saves a model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("decoder")
    words = ["</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += ["Yes", "No", "Maybe", "\u0120great", "\u0120terrible"]
    splits = {word: number for number, word in enumerate(words)}
    tokens = Tokenizer(models.WordLevel(splits, unk_token="?"))
    pieces = "|".join(["Yes", "No", "Maybe", "\u0120great", "\u0120terrible", "."])
    import tokenizers

    tokens.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            pre_tokenizers.Split(tokenizers.Regex(pieces), "isolated"),
        ]
    )
    tokens.decoder = decoders.ByteLevel()
    special = {"eos_token": "</s>", "pad_token": "<pad>"}
    hf.PreTrainedTokenizerFast(tokenizer_object=tokens, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": len(words), "max_position_embeddings": 512}
    model = hf.OPTForCausalLM(hf.OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=32))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return str(folder)
