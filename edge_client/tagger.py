"""Tagging without federation, network or PyTorch: one ``tagger.onnx`` and photos.

Here with a tagger that knows the labels red, green and blue:

>>> from fedmpt.edge_client.tagger import Tagger
>>> tagger = Tagger.load("tagger.onnx")
>>> tagger.tag("sunset.png")
[('red', 0.8...), ('blue', 0.4...)]
>>> tagger.tag("sunset.png", top=1)
[('red', 0.8...)]
>>> tagger.tag("sunset.png", min_probability=0.0)
[('red', 0.8...), ('blue', 0.4...), ('green', 0.2...)]

A photo may also be a Pillow image or an RGB array, and labels and thresholds can be looked up:

>>> import numpy
>>> tagger.tag(numpy.zeros((480, 640, 3), numpy.uint8))
[]
>>> dict(zip(tagger.info.labels, tagger.info.thresholds))
{'red': 0.5, 'green': 0.5, 'blue': 0.25}

Many photos at once:

>>> pixels = tagger.prepare("sunset.png")
>>> prediction = tagger.predict(numpy.stack([pixels, 255 - pixels]))
>>> prediction.probabilities.round(3)
array([[0.8, 0.2, 0.4],
       [0.2, 0.8, 0.6]], dtype=float32)
>>> prediction.heatmaps.shape
(2, 3, 4, 4)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedmpt.edge_client.images import load_pixels, to_pixels
from fedmpt.edge_client.onnx_session import open_session, session_device
from fedmpt.protocol.tagger_info import METADATA_KEY, TaggerError, TaggerInfo, info_from_json

Tags = list[tuple[str, float]]
Photo = Path | str | Image.Image | NDArray[np.uint8]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Prediction:
    """``probabilities`` [B, C]; ``heatmaps`` [B, C, rows, columns], None if the file has no such output."""

    probabilities: FloatArray
    heatmaps: FloatArray | None


class Tagger:
    """A loaded ``tagger.onnx``; safe to call from several threads, best from ``streams`` at once."""

    def __init__(self, info: TaggerInfo, session: Any, streams: int = 1) -> None:
        self.info = info
        self.streams = streams
        self._session = session
        self._outputs = [output.name for output in session.get_outputs()]

    @classmethod
    def load(
        cls, path: Path | str, device: str = "auto", threads: int | None = None, *, many: bool = False
    ) -> Tagger:
        """Open a file written by ``fedmpt export``.

        Args:
            path: the ``.onnx`` file.
            device: ``auto``, ``cpu``, ``cuda`` or ``tensorrt``.
            threads: cores to use; all of them where None.
            many: on a CPU compute each batch on one core and as many at once as there are cores, which is faster
                for many photos; a photo alone then takes longer.

        Raises:
            TaggerError: the file is missing or is no tagger of this version.
        """
        path = Path(path)
        if not path.is_file():
            raise TaggerError(f"{path}: not found; make it with `fedmpt export`")
        session = open_session(path, device, threads, apart=many)
        on_cpu = session_device(session) == "cpu"
        streams = (threads or len(os.sched_getaffinity(0))) if many and on_cpu else 1
        text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY, "")
        info = info_from_json(text, str(path))
        size, labels = info.image_size, len(info.labels)
        inputs = {value.name: (value.type, value.shape[1:]) for value in session.get_inputs()}
        outputs = {value.name: value.shape[1:] for value in session.get_outputs()}
        if inputs != {"pixels": ("tensor(uint8)", [size, size, 3])} or outputs.get("probabilities") != [
            labels
        ]:
            raise TaggerError(f"{path}: its graph does not fit its description; export it again")
        return cls(info, session, streams)

    @property
    def has_heatmaps(self) -> bool:
        """Whether the file was exported with region heat maps."""
        return "heatmaps" in self._outputs

    def prepare(self, image: Photo) -> NDArray[np.uint8]:
        """Preprocess one photo as the graph wants it: uint8 RGB ``[S, S, 3]``; raises PhotoError as :meth:`tag`."""
        size = self.info.image_size
        if isinstance(image, (str, Path)):
            return load_pixels(Path(image), size)
        return to_pixels(image, size)

    def predict(self, pixels: NDArray[np.uint8]) -> Prediction:
        """Run the graph on preprocessed photos, uint8 RGB ``[B, S, S, 3]``."""
        outputs = dict(zip(self._outputs, self._session.run(self._outputs, {"pixels": pixels}), strict=True))
        return Prediction(outputs["probabilities"], outputs.get("heatmaps"))

    def tag(
        self,
        image: Photo,
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
            PhotoError: the photo cannot be read, or has pixels of an unknown type.
        """
        return self.choose(
            self.predict(self.prepare(image)[None]).probabilities[0], top=top, min_probability=min_probability
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
