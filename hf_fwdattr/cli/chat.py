"""The prompt of a command as the model was taught to read one: as it stands, or through its chat template."""

from collections.abc import Iterable
from typing import Any

from ..errors import QueryError


__all__ = ["choose_chat", "prepare_input", "query_of"]

_MARK = "hf-fwdattr"
_CHAT_COLUMNS = {"messages", "conversations"}
_SAMPLE = 8  # rows that are looked at


def query_of(prompt: str, completion: str | None, chat: bool) -> Any:
    """Return the pipeline's input: a prompt, as a user's message where `chat`, and the output if one is given."""
    words: Any = [{"role": "user", "content": prompt}] if chat else prompt
    return {"prompt": words} if completion is None else {"prompt": words, "completion": completion}


def prepare_input(
    pipeline: Any, prompt: str, completion: str | None, chat: bool | None, rows: Any, max_new_tokens: int
) -> tuple[Any, dict[str, Any], str | None]:
    """Return the pipeline's input, what `generate` needs, and a sentence on how the prompt is asked.

    A classifier is asked about a text, and the completion is its label, by name or number.

    Args:
        chat (`bool`, *optional*): `--chat` or `--no-chat`.
        rows (*optional*): the training set.

    Raises:
        QueryError: `--chat` without a chat template, or of a classifier.
    """
    if pipeline.bank.manifest.objective == "sequence-classification":
        if chat:
            raise QueryError("--chat: the model is a classifier, which is asked about a text. Leave the option out")
        label = int(completion) if completion is not None and completion.isdecimal() else completion
        return {"text": prompt} | ({} if label is None else {"label": label}), {}, None
    asked, note = choose_chat(chat, prompt, pipeline, rows)
    settings = {} if completion is not None else {"max_new_tokens": max_new_tokens}
    return query_of(prompt, completion, asked), settings, note


def choose_chat(wanted: bool | None, prompt: str, pipeline: Any, rows: Any = None) -> tuple[bool, str | None]:
    """Choose whether the prompt goes through the tokenizer's chat template, and say why.

    Without a wish, rows decide where they can be read: those that were rendered by the template hold what it puts
    between a question and its answer. Else a template that there is gets used.

    Args:
        wanted (`bool`, *optional*): `--chat` or `--no-chat`.
        rows (*optional*): the training set, tokenized or not.

    Returns:
        The choice, and a sentence; None where there is no template to choose.

    Raises:
        QueryError: `--chat`, and the tokenizer has no template.
    """
    tokenizer = pipeline.tokenizer
    if getattr(tokenizer, "chat_template", None) is None:
        if wanted:
            raise QueryError("--chat: the tokenizer has no chat template. Leave the option out to ask the bare prompt")
        return False, None
    if wanted is not None:
        return wanted, "asked through the chat template" if wanted else "asked without the chat template"
    joint = _joint(tokenizer)
    if joint and joint in prompt:
        return False, "the prompt is rendered already and is asked as it stands"
    columns = set(pipeline.bank.manifest.dataset.columns) | set(getattr(rows, "column_names", None) or [])
    if columns & _CHAT_COLUMNS or (rows is not None and len(rows) and any(map(_is_chat, rows[0].values()))):
        return True, "asked through the chat template, as the rows are chats (--no-chat: the bare prompt)"
    texts = list(_texts(pipeline, rows)) if joint else []
    if not texts:
        return True, "asked through the tokenizer's chat template (--no-chat: the bare prompt)"
    if 2 * sum(joint in text for text in texts) > len(texts):
        return True, "asked through the chat template, as the rows are chats (--no-chat: the bare prompt)"
    return False, "asked without the chat template, as the rows are no chats (--chat: with it)"


def _is_chat(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and ("role" in first or "from" in first)


def _joint(tokenizer: Any) -> str:
    """Return what the template writes between a question and its answer, without spaces; "" where unknown."""
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
        )
    except Exception:  # templates refuse in classes of their own
        return ""
    return text.partition(_MARK)[2].strip()


def _texts(pipeline: Any, rows: Any) -> Iterable[str]:
    """Yield the texts of a few rows, of the dataset or as kept in the bank."""
    if rows is not None:
        for index in range(min(len(rows), _SAMPLE)):
            row = rows[index]
            texts = (value for value in row.values() if isinstance(value, str))
            yield pipeline.tokenizer.decode(row["input_ids"]) if "input_ids" in row else "\n".join(texts)
    elif pipeline.bank.manifest.privacy.text:
        yield from pipeline.bank.texts(list(range(min(len(pipeline.bank), _SAMPLE))))
