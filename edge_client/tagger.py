"""Tagging without federation, network or PyTorch: one ``tagger.onnx`` and photos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fedmpt.edge_client.images import load_pixels, to_pixels
from fedmpt.edge_client.onnx_session import open_session
from fedmpt.protocol.tagger_info import METADATA_KEY, TaggerError, TaggerInfo, info_from_json

Tags = list[tuple[str, float]]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Prediction:
    """``probabilities`` [B, C]; ``heatmaps`` [B, C, rows, columns], None if the file has no such output."""

    probabilities: FloatArray
    heatmaps: FloatArray | None


class Tagger:
    """A loaded ``tagger.onnx``; safe to call from several threads."""

    def __init__(self, info: TaggerInfo, session: Any) -> None:
        self.info = info
        self._session = session
        self._outputs = [output.name for output in session.get_outputs()]

    @classmethod
    def load(cls, path: Path | str, device: str = "auto", threads: int | None = None) -> Tagger:
        """Open a file written by ``fedmpt export``.

        Args:
            path: the ``.onnx`` file.
            device: ``auto``, ``cpu``, ``cuda`` or ``tensorrt``.
            threads: cores to use; all of them where None.

        Raises:
            TaggerError: the file is missing or is no tagger of this version.
        """
        path = Path(path)
        if not path.is_file():
            raise TaggerError(f"{path}: not found; make it with `fedmpt export`")
        session = open_session(path, device, threads)
        text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY, "")
        info = info_from_json(text, str(path))
        size, labels = info.image_size, len(info.labels)
        inputs = {value.name: (value.type, value.shape[1:]) for value in session.get_inputs()}
        outputs = {value.name: value.shape[1:] for value in session.get_outputs()}
        if inputs != {"pixels": ("tensor(uint8)", [size, size, 3])} or outputs.get("probabilities") != [
            labels
        ]:
            raise TaggerError(f"{path}: its graph does not fit its description; export it again")
        return cls(info, session)

    @property
    def has_heatmaps(self) -> bool:
        """Whether the file was exported with region heat maps."""
        return "heatmaps" in self._outputs

    def predict(self, pixels: NDArray[np.uint8]) -> Prediction:
        """Run the graph on preprocessed photos, uint8 RGB ``[B, S, S, 3]``."""
        outputs = dict(zip(self._outputs, self._session.run(self._outputs, {"pixels": pixels}), strict=True))
        return Prediction(outputs["probabilities"], outputs.get("heatmaps"))

    def tag(
        self,
        image: Path | str | Image.Image | NDArray[np.uint8],
        *,
        top: int | None = None,
        min_probability: float | None = None,
    ) -> Tags:
        """The labels of one photo with their probabilities, most probable first.

        Args:
            image: a file, a Pillow image, or an RGB array uint8 ``[height, width, 3]``.
            top: at most so many labels.
            min_probability: one threshold for every label; the file's own thresholds where None.

        Raises:
            PhotoError: the photo cannot be read.
        """
        size = self.info.image_size
        if isinstance(image, (str, Path)):
            pixels = load_pixels(Path(image), size)
        elif isinstance(image, Image.Image):
            pixels = to_pixels(ImageOps.exif_transpose(image), size)
        else:
            pixels = to_pixels(Image.fromarray(image), size)
        return self.choose(
            self.predict(pixels[None]).probabilities[0], top=top, min_probability=min_probability
        )

    def choose(
        self, probabilities: FloatArray, *, top: int | None = None, min_probability: float | None = None
    ) -> Tags:
        """The labels ``(label, probability)`` that reach their threshold in one photo's ``probabilities`` [C]."""
        thresholds: Sequence[float] = self.info.thresholds
        if min_probability is not None:
            thresholds = [min_probability] * len(thresholds)
        chosen = [
            (label, float(probability))
            for label, probability, threshold in zip(self.info.labels, probabilities, thresholds, strict=True)
            if probability >= threshold
        ]
        return sorted(chosen, key=lambda tag: -tag[1])[:top]
