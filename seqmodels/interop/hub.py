"""Checkpoints of the Hugging Face hub, through ``huggingface_hub``, which ``datasets`` brings along."""

from pathlib import Path

from seqmodels import suggest
from seqmodels.data import atomic
from seqmodels.data.text import hub
from seqmodels.errors import UserError

FILES = (
    "config.json", "adapter_config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "*.safetensors", "*.safetensors.index.json",
)  # fmt: skip


def folder(path_or_id: str, revision: str | None = None) -> Path:
    """A local folder as it is, or the hub's copy of an id, downloaded where it is not yet here.

    Raises:
        UserError: there is no such folder, no such id, or no network.
    """
    path = atomic.expanded(path_or_id)
    if path.exists():
        if revision is not None:
            raise UserError(f"--revision={revision} is for a hub id; {path_or_id} is a local folder")
        return path
    if not hub.is_hub_id(path_or_id):
        raise UserError(suggest.no_such("folder", path))
    reachable = hub.reachable()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path_or_id, revision=revision, allow_patterns=list(FILES), local_files_only=not reachable))
    except Exception as error:  # of huggingface_hub, httpx and the disk, without a common base
        if not reachable:
            raise UserError(
                f"there is no folder {path_or_id}, and the Hugging Face hub cannot be reached for an id of that name; "
                f"{suggest.path_hint(path)}".rstrip("; ")
            ) from error
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"the hub's checkpoint {path_or_id!r} cannot be loaded: {reason}") from error
