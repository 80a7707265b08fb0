"""Load a CLIP checkpoint; make image tokens of pixels.

Any Hugging Face ``CLIPModel`` folder or hub name serves. The towers become plain weights and the functions of
``towers.py``; nothing of ``transformers`` but its loaders and its tokenizer is used.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedmpt.export import towers
from fedmpt.export.towers import ACTIVATIONS, TowerSpec, Weights
from fedmpt.protocol.errors import FedmptError

TOKEN_KINDS = ("plain", "maskclip", "clearclip")
TOKEN_MODES = ("full", "pooled")
# The published CLIP's statistics, for a checkpoint without a preprocessor file.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class CheckpointError(FedmptError):
    """A CLIP checkpoint cannot be found, read or used."""


@dataclass(frozen=True)
class ClipCheckpoint:
    """A frozen CLIP: float32 weights of both towers, tokenizer and preprocessing.

    ``logit_scale`` is exponentiated. ``tokenize`` turns words into token ids without start and end;
    ``start`` and ``end`` are the ids of ``[SOS]`` and ``[EOT]``.
    """

    name: str
    licence: str
    image_size: int
    patch_size: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    logit_scale: float
    vision: Weights
    vision_spec: TowerSpec
    text: Weights
    text_spec: TowerSpec
    token_embedding: Tensor
    tokenize: Callable[[str], list[int]]
    start: int
    end: int

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        side = self.image_size // self.patch_size
        return side, side


def load_clip(source: str, licence: str | None = None) -> ClipCheckpoint:
    """Load a checkpoint from a local folder or, by name, from the Hugging Face hub (or its local cache).

    Args:
        licence: of the weights; taken from the checkpoint's model card if not given.

    Raises:
        CheckpointError: no such folder or name, hub unreachable, not a CLIP model, a file missing or damaged,
            weights that do not fit config.json, or an architecture or tokenizer that this loader does not know.
    """
    import transformers as untyped

    transformers: Any = untyped  # its annotations miss what from_pretrained returns
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # no table of weights that do not fit: a line below says it
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise CheckpointError(f"{source}: no config.json in it; give a Hugging Face CLIPModel folder")
    if not folder.is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise CheckpointError(
            f"{source}: no such folder; give a CLIPModel folder or a hub name like owner/model"
        )
    with _loading(source, "config.json"):
        config = transformers.AutoConfig.from_pretrained(source)
    if config.model_type != "clip":
        raise CheckpointError(
            f"{source}: holds a {config.model_type} model; only CLIPModel checkpoints serve"
        )
    with _loading(source, "its file of weights (model.safetensors)"):
        model, report = transformers.CLIPModel.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    if report["missing_keys"]:
        raise CheckpointError(
            f"{source}: weights are missing ({min(report['missing_keys'])}, …); complete it"
        )
    if report["mismatched_keys"]:
        weight, found, wanted = min(report["mismatched_keys"])
        raise CheckpointError(
            f"{source}: the weights do not fit config.json, which wants {weight} of shape {list(wanted)}, "
            f"not {list(found)}; take both from one checkpoint"
        )
    with _loading(source, "its tokenizer (vocab.json and merges.txt, or tokenizer.json)"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    mean, std = _preprocessing(source)
    with _loading(source, "README.md"):
        licence = licence or _licence(source)
    return checkpoint_of(
        model,
        tokenizer,
        name=folder.name if folder.is_dir() else source,
        licence=licence,
        mean=mean,
        std=std,
    )


@contextmanager
def _loading(source: str, part: str) -> Iterator[None]:
    """Name the part that cannot be loaded, whatever went wrong: loaders raise even bare ``Exception``s."""
    try:
        yield
    except Exception as error:
        reason = textwrap.shorten(str(error), 200, placeholder=" …") or type(error).__name__
        hint = "restore it" if Path(source).is_dir() else "check the name and the network, or give a folder"
        raise CheckpointError(f"{source}: {part} cannot be loaded ({reason}); {hint}") from error


def _preprocessing(source: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the channels; the published CLIP's where no file names them."""
    from transformers.utils.hub import cached_file

    mean, std = CLIP_MEAN, CLIP_STD
    for name in ("preprocessor_config.json", "processor_config.json"):  # some have them in the second
        with _loading(source, name):
            path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
            if path is not None:
                settings = json.loads(Path(path).read_text(encoding="utf-8"))
                settings = settings.get("image_processor", settings)
                mean = _channels(settings.get("image_mean", mean))
                std = _channels(settings.get("image_std", std))
    return mean, std


def _channels(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = map(float, values)
    return red, green, blue


def _licence(source: str) -> str:
    """The ``license:`` line of the model card's front matter; "unknown" without one."""
    from transformers.utils.hub import cached_file

    card = cached_file(source, "README.md", _raise_exceptions_for_missing_entries=False)
    if card is None:
        return "unknown"
    front_matter = Path(card).read_text(encoding="utf-8", errors="replace").split("---")
    found = re.search(r"^license:\s*(\S+)", front_matter[1], re.MULTILINE) if len(front_matter) > 2 else None
    return found.group(1) if found else "unknown"


def checkpoint_of(
    model: Any, tokenizer: Any, *, name: str, licence: str, mean: tuple[float, ...], std: tuple[float, ...]
) -> ClipCheckpoint:
    """A loaded ``CLIPModel`` and its tokenizer as a checkpoint; ``mean`` and ``std`` are the preprocessor's.

    Raises:
        CheckpointError: an architecture or tokenizer that this loader does not know.
    """
    config = model.config
    weights = {key: value.detach() for key, value in model.state_dict().items()}
    for part in (config.vision_config, config.text_config):
        if part.hidden_act not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise CheckpointError(f"{name}: unknown activation {part.hidden_act!r}; known are {known}")
    if config.vision_config.image_size % config.vision_config.patch_size:
        raise CheckpointError(f"{name}: the image size is no multiple of the patch size; no known CLIP is so")
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise CheckpointError(f"{name}: the tokenizer has no start or end token; it is not a CLIP tokenizer")

    def tokenize(words: str) -> list[int]:
        return list(tokenizer(words, add_special_tokens=False).input_ids)

    # transformers makes a tokenizer of no words at all where the files of the vocabulary are missing.
    if set(tokenize("photo")) <= {tokenizer.bos_token_id, tokenizer.eos_token_id}:
        raise CheckpointError(
            f"{name}: its tokenizer knows no words; add vocab.json and merges.txt, or tokenizer.json"
        )
    vision_spec, text_spec = _spec(config.vision_config), _spec(config.text_config)
    vision = towers.take_layers(weights, "vision_model", vision_spec) | {
        "class": weights["vision_model.embeddings.class_embedding"],
        "patch.weight": weights["vision_model.embeddings.patch_embedding.weight"],
        "position": weights["vision_model.embeddings.position_embedding.weight"],
        "first_norm.weight": weights["vision_model.pre_layrnorm.weight"],
        "first_norm.bias": weights["vision_model.pre_layrnorm.bias"],
        "last_norm.weight": weights["vision_model.post_layernorm.weight"],
        "last_norm.bias": weights["vision_model.post_layernorm.bias"],
        "projection.weight": weights["visual_projection.weight"].T.contiguous(),
    }
    text = towers.take_layers(weights, "text_model", text_spec) | {
        "position": weights["text_model.embeddings.position_embedding.weight"],
        "last_norm.weight": weights["text_model.final_layer_norm.weight"],
        "last_norm.bias": weights["text_model.final_layer_norm.bias"],
        "projection.weight": weights["text_projection.weight"].T.contiguous(),
    }
    return ClipCheckpoint(
        name=name,
        licence=licence,
        image_size=config.vision_config.image_size,
        patch_size=config.vision_config.patch_size,
        image_mean=mean,
        image_std=std,
        logit_scale=float(weights["logit_scale"].exp()),
        vision=vision,
        vision_spec=vision_spec,
        text=text,
        text_spec=text_spec,
        token_embedding=weights["text_model.embeddings.token_embedding.weight"],
        tokenize=tokenize,
        start=tokenizer.bos_token_id,
        end=tokenizer.eos_token_id,
    )


def _spec(config: Any) -> TowerSpec:
    return TowerSpec(
        config.num_hidden_layers, config.num_attention_heads, config.hidden_act, config.layer_norm_eps
    )


def image_tokens(
    weights: Weights,
    pixels: Tensor,
    *,
    spec: TowerSpec,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    kind: str,
    mode: str,
) -> Tensor:
    """The class token (CLIP's own image feature) and the patch tokens in the joint space.

    Args:
        pixels: ``uint8 [B, S, S, 3]`` RGB.
        kind: how the last block treats the patches. ``plain`` as trained; ``maskclip`` its attention replaced
            by its value path (Zhou et al. 2022); ``clearclip`` query-query attention, no residual, no
            feed-forward (Lan et al. 2024).
        mode: ``full``, or ``pooled``: 2×2 neighbours merged, odd grids padded with nothing.

    Returns:
        ``[B, M, D]``, L2-normalised.
    """
    dtype = weights["patch.weight"].dtype
    scaled = (pixels.to(dtype) / 255 - torch.tensor(mean, dtype=dtype)) / torch.tensor(std, dtype=dtype)
    patches = functional.conv2d(
        scaled.permute(0, 3, 1, 2), weights["patch.weight"], stride=weights["patch.weight"].shape[-1]
    )
    x = patches.flatten(2).transpose(1, 2)
    x = torch.cat([weights["class"].expand(x.shape[0], 1, -1), x], dim=1) + weights["position"]
    x = towers.norm(weights, "first_norm", x, spec)
    for index in range(spec.layers - 1):
        x = _block(weights, f"layers.{index}", x, spec)
    last = f"layers.{spec.layers - 1}"
    if kind == "plain":
        x = _block(weights, last, x, spec)
    else:
        x = torch.cat(
            [_block(weights, last, x, spec, rows=1), _patch_block(weights, last, x, spec, kind)], dim=1
        )
    tokens = towers.linear(weights, "projection", towers.norm(weights, "last_norm", x, spec))
    if mode == "pooled":
        tokens = torch.cat([tokens[:, :1], _pool(tokens[:, 1:], patches.shape[-1])], dim=1)
    return towers.normalise(tokens)


def _block(weights: Weights, layer: str, x: Tensor, spec: TowerSpec, rows: int | None = None) -> Tensor:
    """The block as trained; of the first ``rows`` tokens alone if given."""
    inside = towers.norm(weights, f"{layer}.norm1", x, spec)
    query = _heads(weights, f"{layer}.query", inside[:, :rows], spec)
    key, value = (_heads(weights, f"{layer}.{name}", inside, spec) for name in ("key", "value"))
    mixed = towers.merge_heads(towers.attention(query, key, value))
    return towers.feed_forward(
        weights, layer, x[:, :rows] + towers.linear(weights, f"{layer}.out", mixed), spec
    )


def _patch_block(weights: Weights, layer: str, x: Tensor, spec: TowerSpec, kind: str) -> Tensor:
    """The block changed as ``kind`` says, for the patch tokens."""
    inside = towers.norm(weights, f"{layer}.norm1", x, spec)
    if kind == "maskclip":
        value = towers.linear(weights, f"{layer}.value", inside[:, 1:])
        return towers.feed_forward(
            weights, layer, x[:, 1:] + towers.linear(weights, f"{layer}.out", value), spec
        )
    query, value = (_heads(weights, f"{layer}.{name}", inside, spec) for name in ("query", "value"))
    unscaled = query * query.shape[-1] ** 0.5
    mixed = towers.merge_heads(towers.attention(query[:, :, 1:], unscaled, value))
    return towers.linear(weights, f"{layer}.out", mixed)


def _heads(weights: Weights, name: str, x: Tensor, spec: TowerSpec) -> Tensor:
    return towers.split_heads(towers.linear(weights, name, x), spec)


def _pool(patches: Tensor, side: int) -> Tensor:
    """Sums of normalised 2×2 neighbours ``[B, g², D]`` → ``[B, ⌈g/2⌉², D]``; only directions matter later."""
    width = patches.shape[2]
    grid = towers.normalise(patches).reshape(-1, side, side, width)
    odd = side % 2
    grid = functional.pad(grid, (0, 0, 0, odd, 0, odd))
    half = (side + odd) // 2
    return grid.reshape(-1, half, 2, half, 2, width).sum(dim=(2, 4)).flatten(1, 2)
