"""The README.md of an exported checkpoint: what it is, how it was made, how it is loaded. Hugging Face calls it a model card."""

from collections.abc import Mapping

from seqmodels import data
from seqmodels.config import ModelConfig
from seqmodels.escape import escape
from seqmodels.interop.table import Kind

_LIBRARY_IMPORTS = {"flash-linear-attention": "import fla  # noqa: F401  (adds its models to transformers)\n"}

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- seqmodels
- {model_type}
---

# {architecture}, {parameters:,} parameters

A language model trained with seqmodels: {repeats} x `{pattern}`, width {width}, {vocab_size:,} rows of the vocabulary. The folder is
as {library} saves such a model.

{history}
## Use

```python
{imports}{loading}
```

{tokens}
Say under which licence it may be used before you publish it: `license:` in the lines at the top of this file.
"""

_WITH_TEXT = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # or the id that it was published under
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))"""
_WITHOUT_TEXT = """\
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(".")  # or the id that it was published under"""


def text(
    kind: Kind, config: ModelConfig, parameters: int, tokenizer: data.Tokenizer | None, history: Mapping[str, object]
) -> str:
    """The card as Markdown.

    Args:
        config: of the model, in the kind's pattern.
        history: how the model came about, by name; whatever the values say is text.
    """
    rows = [f"| {escape(name, 'markdown')} | {escape(str(value), 'markdown')} |\n" for name, value in history.items()]
    return _CARD.format(
        model_type=kind.model_type, architecture=kind.architecture, parameters=parameters, repeats=config.repeats,
        pattern=config.pattern, width=config.d_model, vocab_size=config.vocab_size, library=kind.library,
        history="".join(["| | |\n|---|---|\n", *rows]) if rows else "",
        imports="" if kind.library == "transformers" else _LIBRARY_IMPORTS[kind.library],
        loading=_WITHOUT_TEXT if tokenizer is None else _WITH_TEXT,
        tokens=_about_tokens(tokenizer),
    )  # fmt: skip


def _about_tokens(tokenizer: data.Tokenizer | None) -> str:
    if tokenizer is None:
        return "There is no tokenizer in the folder: the model reads and writes token ids.\n"
    end = escape(tokenizer.end_name, "markdown")
    return (
        f"{len(tokenizer.ids):,} ids are tokens; {end} (id {tokenizer.end_of_text}) stands between two texts, and a text that begins "
        "with nothing begins with it.\n"
    )
