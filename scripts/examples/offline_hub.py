"""A bank on the Hub, asked without a network.

    python scripts/examples/offline_hub.py me/my-model --push     # put a tiny fine-tuned model and its bank there
    python scripts/examples/offline_hub.py me/my-model            # once, online: fill the cache by asking
    HF_HUB_OFFLINE=1 python scripts/examples/offline_hub.py me/my-model

Everything is read at the commit that the name points to; each shard is downloaded when a query first needs it, and
verified before it is used. `--push` needs a login (`hf auth login`).
"""

import argparse
import tempfile

import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from hf_fwdattr import ResponseBank, ResponseConfig


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("repository", help="a model with a bank on the Hub, such as me/my-model")
parser.add_argument("--push", action="store_true", help="train a tiny model and put it there first")
parser.add_argument("--prompt", default="user: Who discovered argon? assistant:")


def push(repository: str) -> None:
    """Push model, tokenizer and bank; with the rows' text (`include_text`), they are shown without the dataset."""
    with tempfile.TemporaryDirectory() as folder:
        tiny.finetuned(folder, ResponseConfig(source_column="source", include_text="text", quiet=True))
        AutoModelForCausalLM.from_pretrained(folder).push_to_hub(repository)
        AutoTokenizer.from_pretrained(folder).push_to_hub(repository)
        print("pushed:", ResponseBank.from_pretrained(folder).push_to_hub(repository))


def main(arguments: list[str] | None = None) -> dict:
    options = parser.parse_args(arguments)
    if options.push:
        push(options.repository)
    attribute = pipeline("training-data-attribution", model=options.repository)
    result = attribute(options.prompt, top_k=3, max_new_tokens=12)
    print(f"{options.prompt}{result['generated_text']}   ({attribute.bank.remote})")
    for entry in result["examples"]:
        text = (entry["example"] or {}).get("text", "(the bank keeps no text)")
        print(f"{entry['score']:+8.3f} nats  {entry['source']}: {text}")
    return result


if __name__ == "__main__":
    main()
