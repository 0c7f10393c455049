"""Convert a gguf language model to safetensors with transformers' gguf reader."""

from __future__ import annotations

from pathlib import Path

from florence_vl.convert.card import write_llm_card
from florence_vl.convert.shards import check_disk_space
from florence_vl.files import atomic_folder, check_destination

MAGIC = b"GGUF"


def find_gguf(path: Path) -> Path | None:
    """The gguf file: `path` itself, or the one in a folder without other weights; otherwise None.

    Raises:
        ValueError: The folder contains several.
    """
    if path.is_file():
        with path.open("rb") as file:
            return path if file.read(4) == MAGIC else None
    found = sorted(path.glob("*.gguf"))
    if not found or any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*.bin")):
        return None
    if len(found) > 1:
        raise ValueError(f"{path} has {len(found)} gguf files: {', '.join(f.name for f in found)}; name one of them")
    return found[0]


def convert_gguf(source: Path, destination: Path, overwrite: bool = False, license: str | None = None) -> None:
    """Write a gguf LLM as fp32 safetensors with its tokenizer and chat template.

    transformers dequantizes the whole model in memory: 4 bytes per parameter.

    Args:
        source: The gguf file.
        destination: Folder to write.
        overwrite: Replace an existing folder.
        license: License tag for the card; by default the one in the gguf.

    Raises:
        ValueError: The file is truncated, transformers does not support its architecture, or the disk is too small.
    """
    import gguf

    from florence_vl.model.packaged import convert_gguf_llm

    check_destination(destination, overwrite=overwrite, sources=[source])
    try:
        reader = gguf.GGUFReader(source)
        parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
        stated = reader.get_field("general.license")
        stated_license = license or (str(stated.contents()) if stated is not None else None)
    except Exception as error:  # the reader raises many types
        raise ValueError(
            f"{source}: truncated or damaged gguf ({error}); it has {source.stat().st_size} bytes, download it again"
        ) from error
    check_disk_space(destination, 4 * parameters)
    with atomic_folder(destination, overwrite=overwrite, sources=[source]) as folder:
        try:
            convert_gguf_llm(source, folder)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{source}: transformers can't read this gguf: {error}") from error
        card = write_llm_card(source.name, stated_license)
        (folder / "README.md").write_text(card, encoding="utf-8")
        for path in folder.iterdir():
            path.chmod(0o644)  # transformers' writer makes weights unreadable for other users
