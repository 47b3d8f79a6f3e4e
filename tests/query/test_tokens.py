"""Tokens of inputs: prompt and output tokenized together as in training, and the text of single tokens."""

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from trl.data_utils import common_prefix_length

from hf_fwdattr.errors import QueryError
from hf_fwdattr.query.tokens import output_text, tokenize_input
from tests.helpers.runs import tokenizer


WORDS = [
    "<s>",
    "</s>",
    "<|user|>",
    "<|bot|>",
    "<|end|>",
    "▁",
    "▁the",
    "▁sky",
    "▁is",
    "▁blue",
    "blue",
    "▁now",
    "i",
    "s",
]
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|{{ 'bot' if m['role'] == 'assistant' else 'user' }}|> "
    "{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}"
)
USER, BOT = {"role": "user", "content": "the sky is"}, {"role": "assistant", "content": "blue now"}


def sentencepiece(template: str = "<s> $A", **changes: Any) -> PreTrainedTokenizerFast:
    """Spaces are part of words, and one is put before every text."""
    scored = [(word, -float(len(WORDS) - index)) for index, word in enumerate(WORDS)]
    words = Tokenizer(models.Unigram([("<unk>", 0.0), *scored], unk_id=0))
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    words.decoder = decoders.Metaspace(prepend_scheme="first")
    special = [("<s>", 1), ("</s>", 2)]
    words.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    more = {"additional_special_tokens": ["<|user|>", "<|bot|>", "<|end|>"]} | changes
    result = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **more
    )
    result.chat_template = CHATML
    return result


def bytelevel() -> PreTrainedTokenizerFast:
    """Every byte is a token."""
    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    letters = Tokenizer(models.BPE(vocab=alphabet | {"<end>": 256}, merges=[]))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<end>")


def prefixed() -> PreTrainedTokenizerFast:
    """As RoBERTa: every byte is a token, a space is put before every text, and every text begins and ends."""
    result = bytelevel()
    backend = result.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.post_processor = processors.RobertaProcessing(("<end>", 256), ("<end>", 256))
    return result


def legacy() -> PreTrainedTokenizerFast:
    """As Llama 2: a normalizer puts the space before every text, and the decoder takes the first one away."""
    result = sentencepiece()
    backend = result.backend_tokenizer
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(content=" ", left=1)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), strip])
    return result


def wordpiece() -> PreTrainedTokenizerFast:
    """As BERT: lower case, parts of words, a token at either end, and no beginning or end of its own."""
    words = ["[UNK]", "[CLS]", "[SEP]", "the", "sky", "is", "blue", "now", "b", "##lue", "##s", "i"]
    pieces = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer(lowercase=True)
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.decoder = decoders.WordPiece()
    ends = [("[CLS]", 1), ("[SEP]", 2)]
    pieces.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    special = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=pieces, **special)


@pytest.mark.parametrize("seam", [("the sky is", " blue"), ("the sky is ", "blue"), ("the sky i", "s blue"),
                                  ("the", "  is blue"), ("The Sky", " IS\nblue")])  # fmt: skip
@pytest.mark.parametrize(("kind", "ends"), [(prefixed, 1), (legacy, 0), (wordpiece, 1)])
def test_prompt_and_output_have_the_tokens_of_the_text_that_they_are(
    kind: Any, ends: int, seam: tuple[str, str]
) -> None:
    tokens, (prompt, completion) = kind(), seam
    whole = tokens(prompt + completion)["input_ids"]
    whole = whole[: len(whole) - ends]
    asked = tokenize_input(tokens, {"prompt": prompt, "completion": completion})
    assert asked.input_ids == whole
    alone = tokenize_input(tokens, prompt).input_ids
    cut = common_prefix_length(alone, whole)
    assert asked.labels == [-100] * cut + whole[cut:]
    shown = output_text(tokens, whole, range(cut, len(whole)))
    assert shown.text == "".join(shown.tokens) or "[UNK]" in shown.tokens or "<unk>" in shown.tokens
    if kind is not wordpiece and seam[0] == "the sky is":
        assert shown.text == completion


def output(tokenized: Any) -> list[int]:
    return [label for label in tokenized.labels if label != -100]


def names(tokens: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    return tokens.convert_ids_to_tokens(ids)


def trl_row(tokens: PreTrainedTokenizerFast, prompt: Any, completion: Any) -> tuple[list[int], list[int]]:
    """Return ids and labels of a row as TRL makes them of a prompt and its completion."""
    if isinstance(prompt, str):
        begin, whole = tokens(prompt)["input_ids"], tokens(prompt + completion)["input_ids"]
    else:
        begin = tokens.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        whole = tokens.apply_chat_template(prompt + completion)["input_ids"]
    cut = common_prefix_length(begin, whole)
    return whole, [-100] * cut + whole[cut:]


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("the sky is", " blue now"), ("the sky is ", "blue"), ("the sky", " is"), ("the sky i", "s blue"),
     ([USER], [BOT]), ([USER, BOT, USER], [BOT])],
)  # fmt: skip
@pytest.mark.parametrize("kind", [sentencepiece, bytelevel])
def test_row_asked_about_itself_is_its_own_tokens(kind: Any, prompt: Any, completion: Any) -> None:
    tokens = kind()
    tokens.chat_template = CHATML
    tokens.bos_token = tokens.bos_token or ""
    ids, labels = trl_row(tokens, prompt, completion)
    assert tokenize_input(tokens, {"prompt": prompt, "completion": completion}) == (ids, labels)
    assert tokenize_input(tokens, {"input_ids": ids, "labels": labels}) == (ids, labels)
    mask = [int(label != -100) for label in labels]
    assert tokenize_input(tokens, {"input_ids": ids, "completion_mask": mask}) == (ids, labels)
    cut = labels.count(-100)
    assert tokenize_input(tokens, {"prompt_ids": ids[:cut], "completion_ids": ids[cut:]}) == (ids, labels)


def test_sentencepiece_puts_no_space_at_the_seam() -> None:
    tokens = sentencepiece()
    asked = tokenize_input(tokens, {"prompt": "the sky is ", "completion": "blue"})
    assert names(tokens, output(asked)) == ["▁blue"]
    asked = tokenize_input(tokens, {"prompt": "the sky is", "completion": "blue"})
    assert names(tokens, output(asked)) == ["blue"]


@pytest.mark.parametrize("template", ["<s> $A </s>", "$A </s>", "<s> $A"])
def test_no_end_stands_between_prompt_and_output(template: str) -> None:
    tokens = sentencepiece(template)
    begin = ["<s>"] if template.startswith("<s>") else []
    asked = tokenize_input(tokens, {"prompt": "the sky", "completion": " is blue"})
    assert names(tokens, asked.input_ids) == [*begin, "▁the", "▁sky", "▁is", "▁blue"]
    assert names(tokens, output(asked)) == ["▁is", "▁blue"]
    assert names(tokens, tokenize_input(tokens, "the sky").input_ids) == [*begin, "▁the", "▁sky"]


def test_text_that_a_template_rendered_gets_no_second_beginning() -> None:
    tokens = sentencepiece()
    rendered = tokens.apply_chat_template([USER], add_generation_prompt=True, tokenize=False)
    assert tokenize_input(tokens, rendered) == tokenize_input(tokens, [USER])
    given = tokenize_input(tokens, {"prompt": rendered, "completion": " blue"})
    assert given == tokenize_input(tokens, {"prompt": [USER], "completion": " blue"})
    assert names(tokens, given.input_ids).count("<s>") == 1


def test_first_token_of_a_text_is_scored_only_after_a_beginning() -> None:
    tokens = sentencepiece()
    assert names(tokens, output(tokenize_input(tokens, {"prompt": "", "completion": "the sky"}))) == ["▁the", "▁sky"]
    with pytest.raises(QueryError, match="follows nothing and has no probability"):
        tokenize_input(sentencepiece("$A"), {"prompt": "", "completion": "the sky"})
    whole = {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}
    assert tokenize_input(tokens, whole) == ([5, 6, 7], [-100, 6, 7])


def test_chat_that_ends_with_the_assistant_is_continued() -> None:
    tokens = sentencepiece()
    expected = tokens.apply_chat_template([USER, BOT], continue_final_message=True)["input_ids"]
    assert tokenize_input(tokens, [USER, BOT]).input_ids == expected
    assert names(tokens, expected)[-1] == "▁now"
    opened = tokenize_input(tokens, [USER]).input_ids
    assert names(tokens, opened)[-1] == "<|bot|>"
    one = tokenize_input(tokens, {"prompt": [USER], "completion": BOT})
    assert one == tokenize_input(tokens, {"prompt": [USER], "completion": [BOT]})
    assert names(tokens, output(one))[-1] == "<|end|>"


def test_padding_of_a_row_is_left_out() -> None:
    row = {"input_ids": [0, 0, 5, 6], "labels": [-100, -100, -100, 6], "attention_mask": [0, 0, 1, 1]}
    assert tokenize_input(tokenizer(), row) == ([5, 6], [-100, 6])
    assert tokenize_input(tokenizer(), {"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0]}).input_ids == [5, 6]


def test_chat_without_a_template_is_refused() -> None:
    tokens = bytelevel()
    with pytest.raises(QueryError, match="chat template cannot render the chat"):
        tokenize_input(tokens, [USER])


@pytest.mark.parametrize("text", ["né", "a 🙂🙂 b", "🙂", "日本語 ok", "tail é"])
@pytest.mark.parametrize("prompt", ["x", "🙂🙂🙂"])
def test_characters_of_several_tokens_are_shown_whole(text: str, prompt: str) -> None:
    tokens = bytelevel()
    ids, labels = tokenize_input(tokens, {"prompt": prompt, "completion": text})
    shown = output_text(tokens, ids, [index for index, label in enumerate(labels) if label != -100])
    assert shown.text == text
    assert "".join(shown.tokens) == text
    assert "\ufffd" not in shown.text
    assert shown.tokens == [text[start:end] for start, end in shown.offsets]
    assert [token for token in shown.tokens if token] == list(text)
    assert len(shown.tokens) == len(text.encode())


def test_text_of_tokens_keeps_its_spaces_and_names_special_tokens() -> None:
    tokens = sentencepiece()
    ids, labels = tokenize_input(tokens, {"prompt": [USER], "completion": [BOT]})
    positions = [index for index, label in enumerate(labels) if label != -100]
    shown = output_text(tokens, ids, positions)
    assert shown.tokens == [" blue", " now", "<|end|>"]
    assert shown.text == " blue now"
    assert shown.offsets == [(0, 5), (5, 9), (9, 9)]
