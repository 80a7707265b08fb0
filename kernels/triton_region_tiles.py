"""The few configurations in which the region kernels are compiled, and which of them a call gets.

``benchmarks/kernel_resources.py`` compiles each for every chip and tells its shared memory, registers and spills.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ITERATIONS = ("scalings", "logarithms", "none")
"""What Sinkhorn iterates; nothing for the other poolings."""

MAXIMUM_PATCHES = {2: 1024, 4: 512}
"""By bytes a token element; every float32 tile for more that was tried spills registers."""

RANK_BLOCKS = (32, 128)
MAXIMUM_RANK = RANK_BLOCKS[-1]


@dataclass(frozen=True)
class Tile:
    """One kernel configuration: a block of ``m`` patches by ``c`` labels, ``d`` of the width multiplied at a time.

    ``takes``: those of ``ITERATIONS`` for which a plane and all that they need fit the registers.
    ``pool``: planes whose cosines do not fit beside the weights are multiplied again at the end, so many labels and so
    much of the width at a time; (0, 0) for those that stay.
    ``y``: the backward kernels' block of the gradient's width.
    """

    m: int
    c: int
    d: int
    warps: int
    stages: int
    takes: tuple[str, ...] = ITERATIONS
    pool: tuple[int, int] = (0, 0)
    y: int = 0

    @property
    def registers(self) -> int:
        """All that a thread can have: left alone, ptxas spills some to run two programs on a multiprocessor."""
        return min(255, 65536 // (32 * self.warps))


PLANES = {
    2: (
        Tile(64, 32, 64, 4, 2),
        Tile(64, 128, 64, 8, 3),
        Tile(256, 32, 64, 8, 3),
        Tile(256, 64, 64, 8, 3, takes=("scalings", "none")),
        Tile(256, 128, 16, 8, 3, takes=("scalings",), pool=(32, 64)),
        Tile(512, 16, 32, 16, 2),
        Tile(512, 32, 32, 16, 2, takes=("scalings", "none")),
    ),
    4: (
        Tile(64, 32, 32, 8, 2),
        Tile(256, 32, 32, 8, 2),
    ),
}
"""Planes that stay on chip, by bytes a token element, in the order in which they are tried. None spills registers where
the width, rank and strides are multiples of 16, as CLIP's are; others do, and stay correct."""

BLOCKED = {
    2: (Tile(256, 32, 32, 8, 2), Tile(1024, 8, 16, 16, 1)),
    4: (Tile(256, 16, 16, 8, 2), Tile(512, 8, 16, 16, 1)),
}
"""The second path, by M: blocks of labels, for planes that fit none of the above."""

LABEL_GRADIENTS = {
    2: (Tile(64, 32, 64, 8, 3, y=256), Tile(64, 64, 64, 8, 3, y=256)),
    4: (Tile(32, 32, 32, 4, 2, y=64),),
}
"""The kernels that make planes again, for labels and for the plan: the first whose ``c`` holds them, else the last."""

PATCH_GRADIENTS = {
    2: (Tile(64, 32, 32, 8, 3, y=128), Tile(64, 64, 64, 8, 3, y=128)),
    4: (Tile(32, 32, 32, 8, 2, y=32),),
}
"""The same for patches."""


def forward_tile(patches: int, labels: int, itemsize: int, iterates: str) -> tuple[Tile, bool]:
    """The configuration for a plane and bytes a token element, and whether the plane stays on chip."""
    for tile in PLANES[itemsize]:
        if patches <= tile.m and labels <= tile.c and iterates in tile.takes:
            return tile, True
    return next(tile for tile in BLOCKED[itemsize] if patches <= tile.m), False


def gradient_tile(tiles: Mapping[int, tuple[Tile, ...]], labels: int, itemsize: int) -> Tile:
    """The backward kernels' configuration, from ``LABEL_GRADIENTS`` or ``PATCH_GRADIENTS``."""
    return next((tile for tile in tiles[itemsize] if labels <= tile.c), tiles[itemsize][-1])


def rank_block(rank: int) -> int:
    """The block that holds the whole rank."""
    return next(block for block in RANK_BLOCKS if rank <= block)
