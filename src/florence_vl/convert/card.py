"""The README.md of a converted folder: source, license terms, and switches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LLM_LICENSES = {
    "llama3": (
        "llama3.1",
        "the LLM is Llama 3.1: Llama 3.1 Community License (attribution, acceptable use)",
    ),
    "vicuna_v1": ("llama2", "the LLM is Vicuna 1.5, from Llama 2: Llama 2 Community License"),
    "phi3": ("mit", "the LLM is Phi-3.5-mini: MIT"),
}

_FRONT = """---
license: {license}
library_name: florence-vl
pipeline_tag: image-text-to-text
tags: [florence-vl, florence-2]
---
"""

_FLORENCE_VL = """
# Florence-VL, converted

Converted by florence-vl {version} from `{source}`, {title}.
Values equal the source bit for bit; only names, one transposed matrix and omitted tensors differ.

```python
import florence_vl
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("THIS FOLDER", dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained("THIS FOLDER")
```

Or `florence-vl chat --model THIS_FOLDER --image photo.jpg`.
"""

_FLORENCE2 = """
# Florence-2, converted

Converted by florence-vl {version} from `{source}`, {title}, into transformers'
own classes:

```python
from transformers import Florence2ForConditionalGeneration

model = Florence2ForConditionalGeneration.from_pretrained("THIS FOLDER", dtype="auto")
```
"""


_LLM = """
# Language model, converted

Converted by florence-vl {version} from `{source}` (gguf, dequantized to
float32): the values are those of the quantized weights.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")
```

As the LLM of a Florence-VL: `florence_vl.build_model(vision=..., llm="THIS FOLDER")`.
"""


def write_llm_card(source: str, license: str | None) -> str:
    """README.md of a converted gguf LLM.

    Args:
        source: File name.
        license: License in the gguf, if any.
    """
    from florence_vl import __version__

    front = f"---\nlicense: {(license or 'unknown').lower()}\nlibrary_name: transformers\n---\n"
    return front + _LLM.format(version=__version__, source=source)


def license_of(template: str) -> tuple[str, str]:
    """License tag and sentence for the LLM of a chat template; the authors' own cards state none."""
    return LLM_LICENSES.get(template, ("other", "the LLM's license is unknown; see its source"))


def write_card(report: Mapping[str, Any], title: str, license: str, terms: list[str], florence_vl: bool) -> str:
    """README.md of a converted model.

    Args:
        report: `Plan.report()`.
        title: Description of the source's layout.
        license: Tag for the hub's front matter.
        terms: Sentences on the license terms of the parts.
        florence_vl: Whether it is a Florence-VL (otherwise a Florence-2).
    """
    from florence_vl import __version__

    body = _FLORENCE_VL if florence_vl else _FLORENCE2
    text = _FRONT.format(license=license) + body.format(version=__version__, source=report["source"], title=title)
    text += "\n## Terms\n\n" + "".join(f"- {term}\n" for term in terms)
    if report["settings"]:
        text += "\n## Switches\n\n| setting | value |\n|---|---|\n"
        values = {name: str(value).replace("|", "\\|") for name, value in report["settings"].items()}
        text += "".join(f"| `{name}` | `{value}` |\n" for name, value in values.items())
        if florence_vl:
            text += (
                "\nThey follow the released code as far as it is known; `florence-vl convert THIS_FOLDER --probe "
                "REFERENCES.jsonl` measures the alternatives.\n"
            )
    text += f"\n## Tensors\n\n{report['tensors']} converted, {len(report['dropped'])} omitted:\n\n"
    reasons: dict[str, list[str]] = {}
    for name, reason in report["dropped"].items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        text += f"- {len(names)}: {reason} (`{names[0]}`{' ...' if len(names) > 1 else ''})\n"
    for note in report["notes"]:
        text += f"- note: {note}\n"
    return text
