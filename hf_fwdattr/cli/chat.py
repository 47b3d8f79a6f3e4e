"""The prompt of a command as the model was taught to read one: as it stands, or through its chat template."""

from collections.abc import Iterable
from typing import Any

from ..errors import QueryError


__all__ = ["choose_chat", "query_of"]

_MARK = "hf-fwdattr"
_CHAT_COLUMNS = {"messages", "conversations"}
_SAMPLE = 8  # rows that are looked at


def query_of(prompt: str, completion: str | None, chat: bool) -> Any:
    """Return the pipeline's input: a prompt, as a user's message where `chat`, and the output if one is given."""
    words: Any = [{"role": "user", "content": prompt}] if chat else prompt
    return {"prompt": words} if completion is None else {"prompt": words, "completion": completion}


def choose_chat(wanted: bool | None, prompt: str, pipeline: Any, rows: Any = None) -> tuple[bool, str | None]:
    """Choose whether the prompt goes through the tokenizer's chat template, and say why.

    Without a wish, rows decide where they can be read: those that were rendered by the template hold what it puts
    between a question and its answer. Else a template that there is gets used.

    Args:
        wanted (`bool`, *optional*): `--chat` or `--no-chat`.
        rows (*optional*): the tokenized training set.

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
    if columns & _CHAT_COLUMNS:
        return True, "asked through the chat template, as the rows are chats (--no-chat: the bare prompt)"
    texts = list(_texts(pipeline, rows)) if joint else []
    if not texts:
        return True, "asked through the tokenizer's chat template (--no-chat: the bare prompt)"
    if 2 * sum(joint in text for text in texts) > len(texts):
        return True, "asked through the chat template, as the rows are chats (--no-chat: the bare prompt)"
    return False, "asked without the chat template, as the rows are no chats (--chat: with it)"


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
            yield pipeline.tokenizer.decode(rows[index]["input_ids"])
    elif pipeline.bank.manifest.privacy.text:
        yield from pipeline.bank.texts(list(range(min(len(pipeline.bank), _SAMPLE))))
