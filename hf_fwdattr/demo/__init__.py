"""The demo: teach a small model facts, ask it, and see which rows taught them."""

from importlib.util import find_spec


for _library in ("bm25s", "jinja2", "rich"):
    if find_spec(_library) is None:
        raise ModuleNotFoundError(
            f"hf_fwdattr.demo: {_library} is not installed. Run: pip install 'hf-fwdattr[demo]'", name=_library
        )
