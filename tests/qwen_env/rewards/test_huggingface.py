import copy
import dataclasses
import json
import pickle
import shutil

import gymnasium as gym
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

import qwen_env  # noqa: F401
from qwen_env.errors import UsageError
from qwen_env.rewards import load_reward, score
from qwen_env.rewards.huggingface import HuggingFaceReward, _usable_positions

PAD, START, END = range(3)
SPECIAL = ["<pad>", "<start>", "<end>"]
TEMPLATE = (
    "{% for m in messages %}<start>{{ m.role }}: {{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<start>{% endif %}"
)
COMPLETIONS = [" is good", "", " is a rather long one, isn't it?", " x", "!" * 40]


def build(folder, *, num_labels=1, pad="<pad>", template=None, causal=False):
    """A random Qwen2 reward model with a byte tokenizer, saved by `transformers`."""
    vocab = {token: i for i, token in enumerate(SPECIAL)}
    vocab |= {b: i for i, b in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), len(vocab))}
    backend = Backend(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, eos_token="<end>", chat_template=template
    )
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=len(vocab), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
        num_labels=num_labels, pad_token_id=PAD, eos_token_id=END, initializer_range=0.5,
    )  # fmt: skip
    kind = transformers.Qwen2ForCausalLM if causal else transformers.Qwen2ForSequenceClassification
    model = kind(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def build_bert(folder, **tokenizer_options):
    """A random BERT classifier of 128 positions, whose texts are `[CLS] words [SEP]`."""
    vocab = {t: i for i, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh"])}
    backend = Backend(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", **tokenizer_options,
    )  # fmt: skip
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocab), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=128, num_labels=1, initializer_range=0.5,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def one_by_one(model, tokenizer, texts):
    """The scores with no padding at all: the head on the last token's hidden state."""
    scores = []
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        with torch.no_grad():
            scores.append(model.score(model.model(ids).last_hidden_state[0, -1]).numpy())
    return np.array(scores)


def test_batches_score_as_single_texts_do(tmp_path, make_batch):
    model, tokenizer = build(tmp_path)
    batch = make_batch(COMPLETIONS)
    texts = [f"The film{text}<end>" for text in COMPLETIONS]
    expected = one_by_one(model, tokenizer, texts)[:, 0]
    assert np.ptp(expected) > 0.5, "else the comparison would say nothing"
    for batch_size in (1, 2, 16):
        values = score(HuggingFaceReward(tmp_path, batch_size=batch_size), batch).values
        np.testing.assert_allclose(values, expected, atol=1e-5)
    values = score(load_reward(f"hf:{tmp_path}?batch_size=3&device=cpu"), batch).values
    np.testing.assert_allclose(values, expected, atol=1e-5)


def test_only_a_finished_text_ends_with_the_end_of_sequence_token(tmp_path, make_batch):
    model, tokenizer = build(tmp_path)
    batch = dataclasses.replace(make_batch([" is", " is"]), finish_reasons=["eos", "length"])
    expected = one_by_one(model, tokenizer, ["The film is<end>", "The film is"])[:, 0]
    np.testing.assert_allclose(HuggingFaceReward(tmp_path)(batch), expected, atol=1e-5)


def test_batches_are_sorted_by_length_so_that_little_is_padded(tmp_path, make_batch, monkeypatch):
    build(tmp_path)
    reward = HuggingFaceReward(tmp_path, batch_size=2)
    widths = []
    forward = reward._forward

    def watched(rows):
        widths.append([len(ids) for ids in rows])
        return forward(rows)

    monkeypatch.setattr(reward, "_forward", watched)
    reward(make_batch(COMPLETIONS))
    flat = [width for batch in widths for width in batch]
    assert flat == sorted(flat)
    assert [len(batch) for batch in widths] == [2, 2, 1]


def test_in_the_environment_whose_tokenizer_is_another(tmp_path):
    model, tokenizer = build(tmp_path)
    env = gym.make("QwenText-v0", reward=f"hf:{tmp_path}?device=cpu&dtype=float32")
    env.reset(options={"prompt": "The plot"})
    for token in (*env.unwrapped.task.tokenizer.encode(" is dull."), 0):
        _, reward, terminated, _, info = env.step(token)
    assert terminated and info["completion"] == " is dull."
    (expected,) = one_by_one(model, tokenizer, ["The plot is dull.<end>"])[:, 0]
    assert reward == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("pad", ["<end>", None])
def test_a_last_token_that_is_the_padding_token_counts(tmp_path, make_batch, pad):
    template = TEMPLATE
    model, tokenizer = build(tmp_path, pad=pad, template=template)
    chats = [f"<start>user: The film<end><start>assistant: {text}<end>" for text in COMPLETIONS]
    expected = one_by_one(model, tokenizer, chats)[:, 0]
    values = score(HuggingFaceReward(tmp_path), make_batch(COMPLETIONS)).values
    np.testing.assert_allclose(values, expected, atol=1e-5)


def test_chats_are_read_by_the_reward_model_s_own_template(tmp_path, make_batch):
    model, tokenizer = build(tmp_path, template=TEMPLATE)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    batch = make_batch([" c"], prompt="<policy template>", messages=messages)
    chat = "<start>system: s<end><start>user: u<end><start>assistant:  c<end>"
    expected = one_by_one(model, tokenizer, [chat])[:, 0]
    np.testing.assert_allclose(HuggingFaceReward(tmp_path)(batch), expected, atol=1e-5)

    plain = HuggingFaceReward(tmp_path, use_chat_template=False)
    expected = one_by_one(model, tokenizer, ["<policy template> c<end>"])[:, 0]
    np.testing.assert_allclose(plain(batch), expected, atol=1e-5)


def test_conversations_of_several_turns_are_read_whole(tmp_path, turns):
    model, tokenizer = build(tmp_path, template=TEMPLATE)
    chat = (
        "<start>user: Guess<end><start>assistant: 4<end><start>tool: higher<end>"
        "<start>assistant: 6<end>"
    )
    expected = one_by_one(model, tokenizer, [chat])[:, 0]
    np.testing.assert_allclose(HuggingFaceReward(tmp_path)(turns), expected, atol=1e-5)

    plain = HuggingFaceReward(tmp_path, use_chat_template=False)
    expected = one_by_one(model, tokenizer, ["<Guess>4\nhigher\n6"])[:, 0]
    np.testing.assert_allclose(plain(turns), expected, atol=1e-5)
    turns.messages[0].insert(0, {"role": "system", "content": "Play"})  # a system prompt's
    np.testing.assert_allclose(plain(turns), expected, atol=1e-5)


def test_long_texts_keep_their_end(tmp_path, make_batch):
    model, tokenizer = build(tmp_path)
    expected = one_by_one(model, tokenizer, ["!" * 9 + "<end>"])[:, 0]
    for ten in (10, np.uint8(10)):
        reward = HuggingFaceReward(tmp_path, max_length=ten)
        np.testing.assert_allclose(reward(make_batch(["!" * 40])), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "tokenizer_options", "limit"),
    [
        ({}, {}, 128),
        ({}, {"model_max_length": 20}, 20),
        ({"max_length": 10}, {"model_max_length": 20}, 10),
        ({"max_length": 512}, {}, 128),
    ],
)
def test_long_texts_of_an_encoder_keep_its_special_tokens_and_their_end(
    tmp_path, make_batch, arguments, tokenizer_options, limit
):
    """BERT reads its score at [CLS], and has no position beyond its limit."""
    model, tokenizer = build_bert(tmp_path, **tokenizer_options)
    words = [*"abcdefgh" * 25]
    short, long = "a b c", " ".join(words)
    reward = HuggingFaceReward(tmp_path, **arguments)
    kept = ["[CLS]", *words[-(limit - 2) :], "[SEP]"]
    ids = reward._encode(make_batch([long], prompt=""), 0)
    assert tokenizer.convert_ids_to_tokens(ids) == kept

    with torch.no_grad():
        inputs = (tokenizer(text, return_tensors="pt") for text in (short, " ".join(kept[1:-1])))
        expected = [model(**of_one).logits.item() for of_one in inputs]
    values = reward(make_batch([short, long], prompt=""))
    np.testing.assert_allclose(values, expected, atol=1e-5)


SIZES = {
    "vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 16, "max_position_embeddings": 34, "num_labels": 1, "pad_token_id": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("Bert", SIZES),
        ("Roberta", SIZES),
        ("Roberta", SIZES | {"pad_token_id": 0}),
        ("MPNet", SIZES),
        ("OPT", SIZES | {"ffn_dim": 16, "word_embed_proj_dim": 16}),
        ("GPT2", {"n_positions": 34, "n_embd": 16, "n_layer": 1, "n_head": 2, "pad_token_id": 1}),
    ],
)
def test_usable_positions(kind, sizes):
    """As many as the model takes: one more, and torch finds no row in its table."""
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    limit = _usable_positions(model)
    with torch.inference_mode():
        model(torch.full((1, limit), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, limit + 1), 5))


def test_texts_beyond_roberta_s_positions_lose_their_left_end(tmp_path, make_batch):
    words = ["<s>", "<pad>", "</s>", "<unk>", *"abcdefgh"]
    backend = Backend(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), add_prefix_space=False
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    torch.manual_seed(0)
    config = transformers.RobertaConfig(**SIZES | {"initializer_range": 0.5})
    model = transformers.RobertaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    long = [*"abcdefgh" * 6]
    (score,) = HuggingFaceReward(tmp_path)(make_batch([" ".join(long)], prompt=""))
    with torch.no_grad():
        kept = tokenizer(" ".join(long[-30:]), return_tensors="pt")
        expected = model(kept.input_ids).logits.item()
    assert kept.input_ids.shape == (1, 32)  # <s> and </s> among them; no second </s>
    assert score == pytest.approx(expected, abs=1e-5)


HOSTILE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
from transformers import PreTrainedTokenizerFast as Tokenizer
from transformers import Qwen2Config as Config, Qwen2ForSequenceClassification as Model
"""
AUTO_MAP = {
    "AutoConfig": "hostile.Config",
    "AutoModelForSequenceClassification": "hostile.Model",
    "AutoTokenizer": ["hostile.Tokenizer", "hostile.Tokenizer"],
}


def test_code_of_a_repository_is_never_run(tmp_path, make_batch, monkeypatch):
    """Whatever it says, and whoever answers "y" where transformers asks."""
    build(tmp_path / "safe")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    expected = HuggingFaceReward(tmp_path / "safe")(make_batch(COMPLETIONS))
    for number, (name, changes) in enumerate(
        [
            ("config.json", {"auto_map": AUTO_MAP}),
            ("config.json", {"auto_map": AUTO_MAP, "model_type": "hostile"}),
            ("config.json", {"attn_implementation": "hostile/kernels"}),
            ("tokenizer_config.json", {"auto_map": AUTO_MAP, "tokenizer_class": "Tokenizer"}),
        ]
    ):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "safe", folder)
        (folder / "hostile.py").write_text(HOSTILE)
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(config | changes))
        if "model_type" in changes:
            with pytest.raises(UsageError, match=r"needs code of its own, .* is never run; write"):
                HuggingFaceReward(folder)
        else:
            values = HuggingFaceReward(folder)(make_batch(COMPLETIONS))
            np.testing.assert_array_equal(values, expected)
    assert not list(tmp_path.rglob("ran"))


def test_a_limit_that_leaves_no_room_for_the_text(tmp_path):
    build_bert(tmp_path)
    with pytest.raises(UsageError, match="max_length is 2; it must be at least 3"):
        HuggingFaceReward(tmp_path, max_length=2)


def test_a_label_of_a_classifier(tmp_path, make_batch):
    model, tokenizer = build(tmp_path, num_labels=3)
    expected = one_by_one(model, tokenizer, ["The film<end>"])[:, 2]
    reward = load_reward(f"hf:{tmp_path}?label=LABEL_2")
    np.testing.assert_allclose(reward(make_batch([""])), expected, atol=1e-5)
    for label in (None, "LABEL_3"):
        with pytest.raises(UsageError, match="has the labels 'LABEL_0', 'LABEL_1', 'LABEL_2'"):
            HuggingFaceReward(tmp_path, label=label)


def test_bfloat16(tmp_path, make_batch):
    build(tmp_path)
    batch = make_batch(COMPLETIONS)
    half = HuggingFaceReward(tmp_path, dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    values = half(batch)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, HuggingFaceReward(tmp_path)(batch), atol=0.2)


def test_copies(tmp_path, make_batch):
    build(tmp_path)
    env = gym.make("QwenText-v0", reward=HuggingFaceReward(tmp_path))
    assert env.spec is not None, "which Gymnasium copies"
    reward = env.unwrapped.task.reward
    assert copy.deepcopy(env).unwrapped.task.reward is reward, "a model is not copied in memory"
    batch = make_batch(COMPLETIONS)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(reward))(batch), reward(batch))


def test_an_empty_batch(tmp_path, make_batch):
    build(tmp_path)
    assert HuggingFaceReward(tmp_path)(make_batch([])).shape == (0,)


def test_wrong_folders_and_arguments(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"hf:.*empty cannot be loaded"):
        HuggingFaceReward(tmp_path / "empty")
    build(tmp_path / "lm", causal=True)
    with pytest.raises(UsageError, match=r"has no tensor 'score.weight'"):
        HuggingFaceReward(tmp_path / "lm")
    config = json.loads((tmp_path / "lm" / "config.json").read_text())
    (tmp_path / "lm" / "config.json").write_text(json.dumps(config | {"model_type": "strange"}))
    with pytest.raises(UsageError, match="cannot be loaded"):
        HuggingFaceReward(tmp_path / "lm")
    with pytest.raises(UsageError, match="dtype is 'int8'"):
        HuggingFaceReward(tmp_path, dtype="int8")
    build(tmp_path / "right")
    for arguments, message in (
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"batch_size": 2.5}, "batch_size is 2.5; it must be an integer"),
        ({"max_length": 1}, "max_length is 1; it must be at least 2"),
        ({"device": "abacus"}, "cannot be moved to the device 'abacus'"),
    ):
        with pytest.raises(UsageError, match=message):
            HuggingFaceReward(tmp_path / "right", **arguments)
