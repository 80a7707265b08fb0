"""The few configurations in which the region kernels are compiled, and which of them a call gets.

``benchmarks/kernel_resources.py`` compiles each for every chip and tells its shared memory, registers and spills.
"""

from __future__ import annotations

from dataclasses import dataclass

MAXIMUM_PATCHES = {2: 1024, 4: 256}  # by bytes a token element
MAXIMUM_RANK = 128


@dataclass(frozen=True)
class Tile:
    """One kernel configuration: a block of ``m`` patches by ``c`` labels, ``d`` of the width multiplied at a time.

    ``keep``: the cosines stay on chip beside the weights, instead of being multiplied again at the end.
    ``y``: the backward kernels' block of the gradient's width.
    """

    m: int
    c: int
    d: int
    warps: int
    stages: int
    keep: bool = False
    y: int = 0


PLANES = {
    2: (
        Tile(64, 32, 64, 4, 3, keep=True),
        Tile(64, 128, 64, 8, 3, keep=True),
        Tile(256, 32, 64, 8, 3, keep=True),
        Tile(256, 128, 16, 8, 3),
        Tile(512, 32, 32, 16, 2, keep=True),
    ),
    4: (
        Tile(64, 32, 32, 8, 2, keep=True),
        Tile(256, 32, 32, 8, 2, keep=True),
    ),
}
"""Planes that stay on chip, by bytes a token element, in the order in which they are tried."""

BLOCKED = {
    2: (Tile(256, 32, 32, 8, 2), Tile(1024, 8, 16, 16, 1)),
    4: (Tile(256, 16, 16, 8, 2),),
}
"""The second path, by M: blocks of labels, for planes that fit none of the above."""

GRADIENTS = {
    2: (Tile(64, 32, 64, 8, 3, y=256), Tile(64, 64, 64, 8, 3, y=256)),
    4: (Tile(32, 32, 32, 4, 2, y=64),),
}
"""The kernels that make planes again: the first whose ``c`` holds all labels, else the last."""


def forward_tile(patches: int, labels: int, itemsize: int, scaling: bool) -> tuple[Tile, bool]:
    """The configuration for a plane and bytes a token element, and whether the plane stays on chip.

    A plane that fills the registers pays only while the scalings are iterated: one product an element.
    """
    for tile in PLANES[itemsize]:
        if patches <= tile.m and labels <= tile.c and (tile.keep or scaling):
            return tile, True
    return next(tile for tile in BLOCKED[itemsize] if patches <= tile.m), False


def gradient_tile(labels: int, itemsize: int) -> Tile:
    """The backward kernels' configuration."""
    tiles = GRADIENTS[itemsize]
    return next((tile for tile in tiles if labels <= tile.c), tiles[-1])


def rank_block(rank: int) -> int:
    """A power of two that holds the rank and that a matrix product can have as a side."""
    return max(16, 1 << (rank - 1).bit_length())
