"""Tokens of an input: prompt and output are tokenized together, as a training row is, and cut apart afterwards."""

import json
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from ..errors import QueryError
from ..models.likelihood import IGNORED
from .inputs import unpadded


__all__ = ["OutputText", "TokenizedInput", "output_text", "tokenize_input"]

_CONTEXT = 8  # tokens before an output that say how its first one is spelled
_CHARACTER = 4  # bytes of a character, and so tokens of one, at most
_TOKEN_COLUMNS = ("input_ids", "labels", "attention_mask", "completion_mask")


class TokenizedInput(NamedTuple):
    """Tokens of one input."""

    input_ids: list[int]
    labels: list[int]  # the token where it is output, else -100; all -100 where the output is to be generated


class OutputText(NamedTuple):
    """Text of an output, and of its tokens."""

    text: str
    tokens: list[str]  # they join to the text; special tokens are named here and are not in it
    offsets: list[tuple[int, int]]  # each token's characters in the text


def tokenize_input(tokenizer: Any, given: Any) -> TokenizedInput:
    """Tokenize whatever the pipeline takes: text, a chat, token ids, a prompt with its completion, a training row.

    Of a training row with `messages` the last one is the output, if it is the assistant's; of one with `text` all is.

    Raises:
        QueryError: nothing of these, an empty prompt or completion, or a chat that the template cannot render.
    """
    if isinstance(given, Mapping):
        has_row = given.get("input_ids") is not None
        if given.get("prompt_ids") is not None:
            return _from_ids(given["prompt_ids"], given.get("completion_ids"))
        if has_row and ("prompt" not in given or given.get("labels") is not None):
            return _from_row(given)
        if "prompt" in given:
            return _from_pair(tokenizer, given)
        if _is_chat(given.get("messages")):
            return _from_messages(tokenizer, given)
        if isinstance(given.get("text"), str):
            return _from_text(tokenizer, given["text"])
    elif isinstance(given, str) or _is_chat(given):
        return _from_pair(tokenizer, {"prompt": given})
    elif _is_ids(given):
        return _from_ids(given, None)
    raise QueryError(
        f"cannot attribute a {type(given).__name__}; pass text, chat messages, or prompt and completion, or their "
        "token ids as prompt_ids and completion_ids, or input_ids and labels"
    )


def _from_pair(tokenizer: Any, given: Mapping[str, Any]) -> TokenizedInput:
    """Tokenize a prompt and, if there is one, its completion; either is text or chat messages."""
    prompt, completion = getattr(given["prompt"], "messages", given["prompt"]), given.get("completion")
    completion = [completion] if isinstance(completion, Mapping) else getattr(completion, "messages", completion)
    if isinstance(prompt, Mapping):
        prompt = [prompt]
    if not isinstance(prompt, str) and not _is_chat(prompt):
        raise QueryError(f"the prompt is a {type(prompt).__name__}. Pass text, or a list of chat messages")
    if completion is None or isinstance(completion, str):
        begin = _encode(tokenizer, prompt) if isinstance(prompt, str) else None
        rendered = "" if isinstance(prompt, str) else _render(tokenizer, given, prompt, _opening(prompt))
        begin = _bare(tokenizer, rendered) if begin is None else begin
        if completion is None:
            return _cut(begin, None)
        if isinstance(prompt, str):
            return _cut(begin, _encode(tokenizer, prompt + completion))
        return _cut(begin, _bare(tokenizer, rendered + completion))
    if not _is_chat(completion):
        raise QueryError(f"the completion is a {type(completion).__name__}. Pass text, or a list of chat messages")
    if isinstance(prompt, str):
        raise QueryError(
            "the prompt is text and the completion chat messages. A template renders both together. Pass the prompt "
            "as messages: [{'role': 'user', 'content': ...}]"
        )
    # As the training does, for whose rows the completion begins where the two renderings differ.
    begin = _bare(tokenizer, _render(tokenizer, given, prompt, {"add_generation_prompt": True}))
    return _cut(begin, _bare(tokenizer, _render(tokenizer, given, [*prompt, *completion], {})))


def _from_messages(tokenizer: Any, given: Mapping[str, Any]) -> TokenizedInput:
    """Tokenize a training row of messages, whose last one is the output, if it is the assistant's."""
    messages = list(given["messages"])
    if messages[-1].get("role") != "assistant":
        return _from_pair(tokenizer, {**given, "prompt": messages, "completion": None})
    if len(messages) == 1:
        raise QueryError("the row's messages begin with the assistant's, which answers nothing. Add what it answers")
    return _from_pair(tokenizer, {**given, "prompt": messages[:-1], "completion": messages[-1:]})


def _from_text(tokenizer: Any, text: str) -> TokenizedInput:
    """Tokenize a training row of text: all but its first token, which nothing predicts, are output."""
    ids = _encode(tokenizer, text)
    if len(ids) < 2:
        raise QueryError(
            f"{{'text': {text[:40]!r}}}: a training row of {len(ids)} tokens, of which none follows another. To have "
            "a text continued, pass it alone or as {'prompt': ...}"
        )
    return TokenizedInput(ids, [IGNORED, *ids[1:]])


def _opening(messages: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """Return how a template opens the answer: a last message of the assistant is continued."""
    last = messages[-1].get("role") == "assistant"
    return {"continue_final_message": True} if last else {"add_generation_prompt": True}


def _cut(begin: list[int], whole: list[int] | None) -> TokenizedInput:
    """Cut a prompt with its output where it differs from the prompt alone; a token of both is output.

    Args:
        begin: tokens of the prompt alone.
        whole (*optional*): tokens of prompt and output together; None if the output is to be generated.
    """
    if whole is None:
        if not begin:
            raise QueryError("the prompt is empty: there is nothing to continue. Pass a prompt")
        return TokenizedInput(begin, [IGNORED] * len(begin))
    length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(begin, whole, strict=False)))
    if length == len(whole):
        raise QueryError("the completion is empty: there is no output token to attribute")
    if length == 0:
        raise QueryError(
            "the prompt is empty or one token with the completion: the output's first token follows nothing and has "
            "no probability. Pass a prompt, or the tokenizer's token for the beginning of a text"
        )
    return TokenizedInput(whole, [IGNORED] * length + whole[length:])


def _from_ids(prompt: Any, completion: Any) -> TokenizedInput:
    """Return token ids of a prompt and, if there is one, of its completion."""
    begin = _ids("prompt_ids", prompt)
    return _cut(begin, None) if completion is None else _joined(begin, _ids("completion_ids", completion))


def _joined(begin: list[int], output: list[int]) -> TokenizedInput:
    if not output:
        raise QueryError("the completion is empty: there is no output token to attribute")
    if not begin:
        raise QueryError(
            "the prompt is empty: the output's first token follows nothing and has no probability. Pass a prompt"
        )
    return TokenizedInput(begin + output, [IGNORED] * len(begin) + output)


def _from_row(given: Mapping[str, Any]) -> TokenizedInput:
    """Return a tokenized row: its labels say what is output; without labels it is a prompt."""
    columns = {name: given[name] for name in _TOKEN_COLUMNS if given.get(name) is not None}
    columns["input_ids"] = _ids("input_ids", columns["input_ids"])
    mask = columns.pop("completion_mask", None)
    prompt = "labels" not in columns and mask is None
    if "labels" not in columns:
        kept = _ids("completion_mask", mask) if mask is not None else [0] * len(columns["input_ids"])
        pairs = zip(columns["input_ids"], kept, strict=False)
        columns["labels"] = [token if bit else IGNORED for token, bit in pairs]
    ids, labels = unpadded(columns)
    if prompt:
        return _cut(ids, None)
    if not any(label != IGNORED for label in labels[1:]):
        raise QueryError("the row has no supervised token (all labels are -100, or only its first token)")
    return TokenizedInput(ids, [IGNORED, *labels[1:]])  # nothing predicts a row's first token


def _ids(name: str, column: Any) -> list[int]:
    """Return plain token ids."""
    column = column.tolist() if hasattr(column, "tolist") else column
    if not isinstance(column, Sequence) or not (_is_ids(column) or len(column) == 0):
        raise QueryError(f"{name} are not a list of whole numbers. Pass the token ids of one text")
    return [int(value) for value in column]


def _is_ids(given: Any) -> bool:
    """Return whether something is a nonempty list, array or tensor of token ids; bytes are text to most."""
    if isinstance(given, bytes | bytearray | memoryview):
        return False
    given = given.tolist() if hasattr(given, "tolist") else given
    return (
        isinstance(given, Sequence)
        and len(given) > 0
        and all(hasattr(value, "__index__") and not isinstance(value, bool) for value in given)
    )


def _is_chat(given: Any) -> bool:
    """Return whether something is a nonempty list of messages."""
    messages = getattr(given, "messages", given)
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        return False
    return all(isinstance(message, Mapping) and "role" in message for message in messages)


def _render(tokenizer: Any, given: Mapping[str, Any], messages: Any, how: Mapping[str, bool]) -> str:
    """Render a chat by the tokenizer's template, with the tools and template options that a row may have.

    Raises:
        QueryError: there is no template, or it refuses the chat.
    """
    options = dict(given.get("chat_template_kwargs") or {})
    try:
        if given.get("tools") is not None:
            tools = given["tools"]
            options["tools"] = json.loads(tools) if isinstance(tools, str) else tools  # as TRL's rows have them
        return tokenizer.apply_chat_template(list(messages), tokenize=False, **how, **options)
    except Exception as error:
        raise QueryError(
            f"the tokenizer's chat template cannot render the chat: {error}. Pass text as the prompt, or a tokenizer "
            "with the template that the training used"
        ) from error


def _bare(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text alone, without those that the tokenizer puts around every text."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _encode(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text after those that begin every text, once; tokens that end every text are left out."""
    ids, opening = _bare(tokenizer, text), _opening_tokens(tokenizer)
    return ids if ids[: len(opening)] == opening else opening + ids


def _opening_tokens(tokenizer: Any) -> list[int]:
    """Return the tokens that a tokenizer puts before every text."""
    bare, framed = _bare(tokenizer, "a"), list(tokenizer("a")["input_ids"])
    for start in range(len(framed) - len(bare) + 1):
        if bare and framed[start : start + len(bare)] == bare:
            return framed[:start]
    return framed[:1] if framed[:1] == [getattr(tokenizer, "bos_token_id", None)] else []


def output_text(tokenizer: Any, input_ids: Sequence[int], positions: Sequence[int]) -> OutputText:
    """Return the text of the tokens at some positions, ascending; it is spelled as it is after the tokens before.

    A character of several tokens belongs to the first of them, and the others are empty.
    """
    ids, special = list(input_ids), set(tokenizer.all_special_ids)
    pieces = _pieces(tokenizer, ids[: positions[-1] + 1], positions[0])
    text, tokens, offsets = "", [], []
    for position in positions:
        piece = "" if ids[position] in special else pieces[position - positions[0]]
        offsets.append((len(text), len(text) + len(piece)))
        tokens.append(tokenizer.decode([ids[position]]) if ids[position] in special else piece)
        text += piece
    return OutputText(text, tokens, offsets)


def _pieces(tokenizer: Any, ids: list[int], first: int) -> list[str]:
    """Return what each token from `first` on adds to the text; special tokens add nothing."""

    def decode(start: int, end: int) -> str:
        return tokenizer.decode(ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    # Text is decoded between ends of characters; one that is not complete is decoded as U+FFFD.
    begin = max(first - _CONTEXT, 0)
    while begin > max(first - _CONTEXT - _CHARACTER, 0) and decode(begin, first).startswith("\ufffd"):
        begin -= 1
    pieces, ends = [""] * (len(ids) - first), [begin, first]
    for end in range(first + 1, len(ids) + 1):
        start, done = ends[-_CONTEXT:][0], ends[-1]
        before, after = decode(start, done).rstrip("\ufffd"), decode(start, end)
        if after.endswith("\ufffd") and end < len(ids) and end - done < _CHARACTER:
            continue
        pieces[done - first] = after[len(before) :] if after.startswith(before) else decode(done, end)
        ends.append(end)
    return pieces
