"""Models to and from folders and the Hugging Face hub."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Self, cast

from torch import Tensor, nn

from beit_fast.models.checkpoints import load_checkpoint
from beit_fast.models.configs import BeitConfig, named_config, timm_fields
from beit_fast.models.reading import WEIGHT_FILES, CheckpointError
from beit_fast.network import is_reachable
from beit_fast.version import __version__

_PREFIX = "hf-hub:"
_OUR_KEYS = ("library_name", "library_version", "model_class")
_CARD = """---
library_name: beit_fast
license: other
tags:
- beit
- image-classification
---

A `beit_fast.{kind}`, loaded with `beit_fast.{kind}.from_pretrained("{name}")`. Its architecture is in `config.json`.
"""


def write_weights(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with the permissions of any other new file (safetensors' own are its owner's alone).

    Raises:
        OSError: it cannot be written; the message names it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    try:
        save_file(dict(tensors), path, metadata=dict(metadata))
    except SafetensorError as error:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            f"cannot write {path} ({' '.join(str(error).split())}): {size / 2**20:,.2f} MiB are needed, "
            f"{free / 2**20:,.2f} MiB are free; free some space or choose another folder"
        ) from error
    path.chmod(mode)


def save_folder(model: nn.Module, config: Mapping[str, Any], folder: Path) -> None:
    """Writes `config.json` and `model.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"library_name": "beit_fast", "library_version": __version__, "model_class": type(model).__name__}
    (folder / "config.json").write_text(json.dumps({**values, **config}, indent=2) + "\n")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_weights(state, folder / "model.safetensors", {"format": "pt"})


def weights_at(source: str | Path, **download: Any) -> Path:
    """The local path of a file or folder of weights, fetched first if it is named "hf-hub:owner/name[@revision]".

    Args:
        download: arguments of `huggingface_hub.hf_hub_download`.

    Raises:
        CheckpointError: it cannot be fetched.
    """
    text = str(source)
    if not text.startswith(_PREFIX):
        return model_folder(source)
    repository, _, revision = text.removeprefix(_PREFIX).partition("@")
    if revision:
        download["revision"] = revision
    try:
        return _fetched(repository, "model.safetensors", download)
    except CheckpointError as error:
        if "EntryNotFound" not in type(error.__cause__).__name__ or "Local" in type(error.__cause__).__name__:
            raise
    return _fetched(repository, "pytorch_model.bin", download)


def model_folder(path: str | Path) -> Path:
    """The folder that a finished run leaves its model in, where `path` is a run; any other path as it is.

    Raises:
        CheckpointError: the run has not finished.
    """
    root = Path(path)
    if (root / "model" / "config.json").is_file():
        return root / "model"
    if (root / "checkpoints").is_dir():
        raise CheckpointError(f"{root}: this run has not finished and left no model/; the same command continues it")
    return root


def config_at(source: str | Path) -> tuple[BeitConfig | None, Path | None]:
    """The architecture that a folder or a repository of the hub describes, and the local folder of its `config.json`.

    Both are None where `source` is a file, or a folder without that file.

    Raises:
        CheckpointError: it cannot be fetched, or describes no BEiT.
    """
    text = str(source)
    if text.startswith(_PREFIX):
        repository, _, revision = text.removeprefix(_PREFIX).partition("@")
        file = _fetched(repository, "config.json", {"revision": revision or None})
    else:
        file = model_folder(source) / "config.json"
    if not file.is_file():
        return None, None
    config = _read_config(file, classifier=True)
    if not text.startswith(_PREFIX):
        _check_size(file, config, classifier=True)
    return config, file.parent


def _fetched(repository: str, file: str, download: Mapping[str, Any]) -> Path:
    try:
        from huggingface_hub import constants, hf_hub_download
    except ModuleNotFoundError:
        raise CheckpointError(
            f"{repository}: fetching needs huggingface_hub: pip install beit-fast[hub], or give the path of a file"
        ) from None
    given = {key: value for key, value in download.items() if value is not None}
    offline = not is_reachable(constants.ENDPOINT)  # the hub's own library tries for half a minute
    try:
        if offline:
            given["local_files_only"] = True
        return Path(hf_hub_download(repository, file, **given))
    except Exception as error:
        url = f"https://huggingface.co/{repository}/resolve/{download.get('revision') or 'main'}/{file}"
        why = f"{constants.ENDPOINT} cannot be reached" if offline else type(error).__name__
        raise CheckpointError(
            f"{repository}: {file} could not be fetched ({why}); fetch {url} where there "
            "is a network, then give the path of the file"
        ) from error


class HubMethods:
    """`from_pretrained`, `save_pretrained` and `push_to_hub` of a model made from a `BeitConfig`.

    Folders hold `config.json` and `model.safetensors`. Uploading is left to huggingface_hub's `ModelHubMixin`; loading
    is not, because that one passes over names that do not fit in silence.
    """

    config: BeitConfig
    is_described_by_config = True
    """Whether a model made from `config` alone has the same modules."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        config: BeitConfig | dict[str, Any] | None = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Writes the model into a folder, and uploads it to `repo_id` with `push_to_hub`; returns the commit's address.

        `config` and `model_card_kwargs` are what huggingface_hub's mixin passes; the model's own config is written.
        """
        if not self.is_described_by_config:
            raise ValueError("config.json cannot describe a model with its own norm_layer: save its state_dict()")
        folder = Path(save_directory)
        save_folder(cast(nn.Module, self), asdict(self.config), folder)
        if not (folder / "README.md").exists():
            (folder / "README.md").write_text(_CARD.format(kind=type(self).__name__, name=repo_id or folder.name))
        return self.push_to_hub(repo_id or folder.name, **push_to_hub_kwargs) if push_to_hub else None

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Uploads what `save_pretrained` writes; arguments of `huggingface_hub.ModelHubMixin.push_to_hub`."""
        from huggingface_hub import ModelHubMixin

        return ModelHubMixin.push_to_hub(cast(ModelHubMixin, self), repo_id, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        verbose: bool = False,
        **overrides: Any,
    ) -> Self:
        """A model in evaluation mode, from a run folder, another folder or a repository of the hub.

        Reads what this class, timm (`timm/beit_...`) and transformers (`microsoft/beit-...`) save.

        Args:
            verbose: print what became of each tensor.
            overrides: fields of `BeitConfig`, such as `num_classes=10` or `image_size=384`: tables are resized, a head
                of another size starts afresh.

        Raises:
            CheckpointError: a file is missing or cannot be fetched, or does not fit this class.
        """
        folder = model_folder(pretrained_model_name_or_path)
        if folder.is_dir():
            file, weights = folder / "config.json", folder
        else:
            repository = str(pretrained_model_name_or_path).removeprefix(_PREFIX)
            if repository.count("/") != 1 or repository.startswith((".", "/")):
                raise CheckpointError(f"{folder}: no such folder, and no repository owner/name")
            download = {
                "revision": revision, "cache_dir": cache_dir, "token": token, "force_download": force_download,
                "local_files_only": local_files_only,
            }  # fmt: skip
            file = _fetched(repository, "config.json", download)
            weights = weights_at(_PREFIX + repository, **download)
        classifier = hasattr(cls, "forward_head")
        config = _read_config(file, classifier)
        _check_size(file, config, classifier, weights)
        config = replace(config, **overrides)
        model = cls(config)  # type: ignore[call-arg]
        assert isinstance(model, nn.Module)
        load_checkpoint(model, weights, verbose=verbose)
        return model.eval()


def _read_config(file: Path, classifier: bool) -> BeitConfig:
    """The `config.json` of this library, timm or transformers, for a classifier or for masked image modelling."""
    try:
        values = json.loads(file.read_text())
        if values.get("library_name") == "beit_fast":
            config = BeitConfig(**tuples({key: v for key, v in values.items() if key not in _OUR_KEYS}))
        elif values.get("model_type") == "beit":
            config = _from_transformers(values)
        elif "architecture" in values:
            config = _from_timm(values)
        else:
            raise ValueError("it is none of beit_fast, timm or transformers")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(f"{file}: describes no BEiT ({error})") from error
    if classifier and (config.relative_position_bias == "shared" or config.head_layers):
        return config.for_classification(config.num_classes)
    if not classifier and config.relative_position_bias == "per_block":
        raise CheckpointError(f"{file}: a classifier, with a table for each block; open it with Beit.from_pretrained")
    return config


def _check_size(file: Path, config: BeitConfig, classifier: bool, weights: Path | None = None) -> None:
    """Refuse a model that the weights beside its description cannot fill, before memory is taken for it.

    Raises:
        CheckpointError: the description names more parameters than the weights have bytes.
    """
    weights = file.parent if weights is None else weights
    if weights.is_dir():
        weights = next((path for name in WEIGHT_FILES if (path := weights / name).is_file()), weights)
    if not weights.is_file():
        return
    tables = {"none": 0, "shared": 1, "per_block": config.depth}[config.relative_position_bias]
    height, width = config.grid
    outputs = config.num_classes if classifier else config.vocab_size
    count = (
        config.depth * (4 + 2 * config.mlp_ratio) * config.width**2
        + config.width * (outputs + config.in_chans * config.patch_size**2)
        + (config.width * config.num_patches if config.use_abs_pos_emb else 0)
        + tables * config.num_heads * (2 * height - 1) * (2 * width - 1)
    )
    if count > (size := weights.stat().st_size):
        raise CheckpointError(
            f"{file}: describes a model of {count / 1e6:,.0f} million parameters, but {weights.name} has only "
            f"{size / 2**20:,.1f} MiB: they do not fit; take the config.json of these weights"
        )


def tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass as JSON has them, its tuples as such."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _from_transformers(values: Mapping[str, Any]) -> BeitConfig:
    values = tuples(values)
    if values.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"hidden_act {values['hidden_act']!r} is not supported")
    own, shared = (values.get(f"use_{kind}relative_position_bias", False) for kind in ("", "shared_"))
    if own and shared:
        raise ValueError("tables for each block and a shared one together are not supported")
    width = values.get("hidden_size", 768)
    return BeitConfig(
        image_size=values.get("image_size", 224),
        patch_size=values.get("patch_size", 16),
        in_chans=values.get("num_channels", 3),
        width=width,
        depth=values.get("num_hidden_layers", 12),
        num_heads=values.get("num_attention_heads", 12),
        mlp_ratio=values.get("intermediate_size", 3072) / width,
        layer_norm_eps=values.get("layer_norm_eps", 1e-12),
        use_abs_pos_emb=values.get("use_absolute_position_embeddings", False),
        relative_position_bias="per_block" if own else "shared" if shared else "none",
        layer_scale_init=values.get("layer_scale_init_value", 0.1) or None,
        drop_path_rate=values.get("drop_path_rate", 0.1),
        proj_drop_rate=values.get("hidden_dropout_prob", 0.0),
        pos_drop_rate=values.get("hidden_dropout_prob", 0.0),
        attn_drop_rate=values.get("attention_probs_dropout_prob", 0.0),
        vocab_size=values.get("vocab_size", 8192),
        num_classes=len(values["id2label"]) if "id2label" in values else values.get("num_labels", 2),
        global_pool="avg" if values.get("use_mean_pooling", True) else "token",
    )


def _from_timm(values: Mapping[str, Any]) -> BeitConfig:
    config = named_config(values["architecture"].partition(".")[0])
    known = {field.name for field in fields(BeitConfig)}
    own = {name: value for name, value in values.items() if name in known}
    given = {**own, **timm_fields(tuples(values.get("model_args", {})))}
    classes = given.pop("num_classes", 1000)
    return config.for_classification(classes, **given)
