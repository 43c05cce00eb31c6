"""Masked modelling that goes on from weights: which may start it, what they keep of their head, and what learns."""

from dataclasses import replace
from typing import Any, NamedTuple

from beit_fast.models import BeitForMaskedImageModeling
from beit_fast.models.checkpoints import load_state_dict
from beit_fast.models.key_names import to_official
from beit_fast.models.reading import read_state_dict
from beit_fast.tokenizers import Tokenizer
from beit_fast.train.checkpoint.format import read_verified
from beit_fast.train.tasks.weights import resolve_weights, saved_config, weights_file

_HEAD = "lm_head."


class StartingWeights:
    """Tensors that a masked image model starts from.

    Args:
        path: as `weights.resolve_weights` takes it.
        fine_tuned: take weights that were fine-tuned to classify, too.

    Raises:
        ValueError: they cannot be read, or were fine-tuned and that is not asked for.
    """

    def __init__(self, path: str, fine_tuned: bool = False) -> None:
        self.path = path
        with weights_file(path) as file:
            tensors, _ = to_official(read_state_dict(file))
        self._tensors = tensors
        per_block = any(name.endswith("attn.relative_position_bias_table") for name in tensors)
        if ("head.weight" in tensors or per_block) and not fine_tuned:
            signs = [f"a head of {len(tensors['head.weight'])} classes"] if "head.weight" in tensors else []
            signs += ["a position table in each block"] if per_block else []
            raise ValueError(
                f"--weights {path} were fine-tuned to classify ({' and '.join(signs)}); masked modelling goes on from "
                "pre-trained ones (official names end in _pt22k or _pt1k); --fine-tuned-weights takes them all the same"
            )
        self.tables: dict[str, Any] = {"relative_position_bias": "per_block"} if per_block else {}
        """What the weights say of the architecture beyond the options of a `ModelConfig`."""

    def load(self, model: BeitForMaskedImageModeling, tokenizer: Tokenizer | None, verbose: bool = True) -> None:
        """Put them into `model`; the head over visual tokens only where these are the tokenizer's."""
        tensors = self._tensors
        if not self._speaks(tokenizer):
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_HEAD)}
        load_state_dict(model, tensors, source=self.path, verbose=verbose)

    def _speaks(self, tokenizer: Tokenizer | None) -> bool:
        """Whether the head predicts the tokens of this tokenizer; None stands for pixels.

        Of a run the hash of its tokenizer tells; released heads are DALL-E's, those of BEiT v2 its own tokenizer's.
        """
        run = saved_config(self.path)
        if run:
            resolved = resolve_weights(self.path)
            state = read_verified(resolved).state if (resolved / "manifest.json").is_file() else {}
            return state.get("identity", {}).get("tokenizer_sha256") == (
                None if tokenizer is None else tokenizer.sha256
            )
        is_v2 = any(name.startswith("cls_pt_layers.") for name in self._tensors)
        return tokenizer is not None and tokenizer.name == ("vqkd" if is_v2 else "dalle")


def check_channels(tokenizer: Tokenizer, channels: int, name: str) -> None:
    """ValueError where a tokenizer cannot see images of so many channels; grey ones go through one of colours."""
    if channels not in (tokenizer.channels, 1):
        raise ValueError(
            f"the tokenizer {name} sees {tokenizer.channels} channels, the images have {channels}; train one for them: "
            f"beit-fast train train_tokenizer --data.path IMAGES --data.channels {channels}"
        )
    if tokenizer.channels not in (channels, 3):
        raise ValueError(
            f"the tokenizer {name} sees {tokenizer.channels} channels, the images have {channels}; take the "
            "--data.channels that it was trained with"
        )


class Defaults(NamedTuple):
    """What continued pre-training does with a budget of images."""

    images: int
    """Up to so many images seen."""
    lr: float
    """As a share of what random weights take, 1.5e-3 at a batch of 2048 and with the square root of the batch."""
    warmup: float
    """Share of the run."""
    layer_decay: float


DEFAULTS = (
    Defaults(300_000, 1 / 3, 0.1, 0.75),
    Defaults(3_000_000, 2 / 3, 0.05, 0.9),
    Defaults(2**62, 1.0, 0.05, 1.0),
)
"""By the number of images seen; reasons and what was tried: docs/own-images.md."""
TRIED = 6_400
"""Images seen up to which the defaults were tried; those above are estimates."""


def defaults_for(images: int) -> Defaults:
    """The row of the table for a run that sees so many images."""
    return next(row for row in DEFAULTS if images <= row.images)


def with_images_seen(config: Any, typed: set[str]) -> Any:
    """A configuration with `defaults_by_images_seen` and a length in steps, completed by them; any other as it is.

    Args:
        typed: names of the fields that the user set, dotted; they stay.
    """
    if not getattr(config, "defaults_by_images_seen", False) or config.steps is None:
        return config
    row = defaults_for(config.steps * config.batch_size)
    rate = row.lr * 1.5e-3 * (config.batch_size / 2048) ** 0.5
    optim = {"lr": rate, "warmup_steps": max(1, round(row.warmup * config.steps))}
    if "optim.warmup_epochs" in typed:
        del optim["warmup_steps"]
    changed = {name: value for name, value in optim.items() if f"optim.{name}" not in typed}
    own = {} if "layer_decay" in typed else {"layer_decay": row.layer_decay}
    return replace(config, optim=replace(config.optim, **changed), **own)


def budget_lines(config: Any, images: int) -> list[tuple[str, str]]:
    """What a run's length buys, for --dry-run."""
    if config.steps is None:
        return []
    seen = min(config.steps, config.max_steps or config.steps) * config.batch_size
    lines = [("budget", f"{seen:,} images seen: {seen / images:,.1f} times each of {images:,}")]
    if config.weights is not None and config.defaults_by_images_seen:
        source = "tried on built-in images" if seen <= TRIED else "an estimate: nothing so long was tried"
        decay = "all alike" if config.layer_decay is None else f"{config.layer_decay:g}"
        lines.append(
            ("  for so many", f"learning rate {config.optim.lr:.2g}, layer decay {decay}, {config.frozen_blocks} "
             f"frozen blocks ({source})")
        )  # fmt: skip
    return lines


def plain_size(size: tuple[int, int]) -> int | tuple[int, int]:
    """A square size as one number."""
    return size[0] if size[0] == size[1] else size
