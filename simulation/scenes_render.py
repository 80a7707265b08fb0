"""How a scene is painted: procedural backgrounds, sprites with shadows, lighting and weather. NumPy and Pillow only."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image, ImageFilter

BANK_SIZE = 224  # side of a background in the bank, pixels; pictures are random cuts of it
BANK_VARIANTS = 5

Array = np.ndarray


def _noise(generator: np.random.Generator, octaves: tuple[int, ...], stretch: float = 1.0) -> Array:
    """Smooth noise ``[BANK_SIZE, BANK_SIZE]`` in about −1 … 1: one random grid per octave, enlarged."""
    total: Array = np.zeros((BANK_SIZE, BANK_SIZE), np.float32)
    for cells in octaves:
        grid = generator.standard_normal((cells, max(2, round(cells * stretch)))).astype(np.float32)
        layer = Image.fromarray(grid).resize((BANK_SIZE, BANK_SIZE), Image.Resampling.BICUBIC)
        total += np.asarray(layer) / np.sqrt(len(octaves))
    return np.asarray(total * 0.5)


def _mix(low: tuple[int, ...], high: tuple[int, ...], amount: Array) -> Array:
    """Colour ``[S, S, 3]`` between two colours; `amount` in 0 … 1."""
    share = np.clip(amount, 0, 1)[..., None]
    return np.asarray(np.asarray(low, np.float32) * (1 - share) + np.asarray(high, np.float32) * share)


_GRID: Array = np.mgrid[0:BANK_SIZE, 0:BANK_SIZE].astype(np.float32)
_ROWS, _COLUMNS = _GRID[0], _GRID[1]


def _colour(red: int, green: int, blue: int) -> Array:
    return np.asarray((red, green, blue), np.float32)


def _meadow(g: np.random.Generator) -> Array:
    blades = _noise(g, (110, 60), 0.5)
    ground = _mix((58, 110, 40), (135, 175, 75), 0.5 + 0.3 * _noise(g, (5, 11, 23)) + 0.35 * blades)
    flowers = g.random((BANK_SIZE // 4, BANK_SIZE // 4)) > 0.988
    spots = np.kron(flowers, np.ones((4, 4)))[..., None] > 0
    tint = np.array([(245, 235, 120), (240, 240, 245)][int(g.integers(2))], np.float32)
    return np.where(spots & ((_ROWS % 4 < 3) & (_COLUMNS % 4 < 3))[..., None], tint, ground)


def _snow(g: np.random.Generator) -> Array:
    drifts = 0.6 + 0.5 * _noise(g, (3, 6, 12), 0.5) + 0.08 * _noise(g, (100,))
    return _mix((176, 196, 222), (248, 250, 253), drifts)


def _beach(g: np.random.Generator) -> Array:
    shore = BANK_SIZE * g.uniform(0.3, 0.5) + 14 * _noise(g, (4,))
    sand = _mix((205, 175, 120), (240, 218, 170), 0.5 + 0.25 * _noise(g, (6, 90)))
    sea = _mix((30, 130, 170), (120, 205, 215), _ROWS / BANK_SIZE * 2 + 0.15 * _noise(g, (40,), 0.2))
    foam = np.abs(_ROWS - shore) < 4 + 3 * _noise(g, (20,))
    picture = np.where((shore > _ROWS)[..., None], sea, sand)
    return np.where(foam[..., None], np.float32(242), picture)


def _water(g: np.random.Generator) -> Array:
    waves = np.sin(_ROWS / g.uniform(3.5, 6) + 2.5 * _noise(g, (5, 12), 0.4)) * 0.25
    return _mix((12, 60, 110), (70, 150, 190), 0.45 + waves + 0.3 * _noise(g, (8, 25), 0.3))


def _brick(g: np.random.Generator) -> Array:
    height, width = int(g.integers(13, 20)), int(g.integers(28, 42))
    row = _ROWS // height
    across = _COLUMNS + (row % 2) * (width / 2)
    tone = g.standard_normal((BANK_SIZE // height + 2, BANK_SIZE // width + 3)).astype(np.float32)
    bricks = _mix(
        (120, 52, 40), (190, 96, 72), 0.5 + 0.25 * tone[row.astype(int), (across // width).astype(int)]
    )
    bricks = bricks + 14 * _noise(g, (60, 110))[..., None]
    mortar = (_ROWS % height < 2) | (across % width < 2)
    return np.where(mortar[..., None], _colour(196, 186, 172), bricks)


def _wood(g: np.random.Generator) -> Array:
    height = int(g.integers(20, 34))
    board = (_ROWS // height).astype(int)
    tone = g.standard_normal(BANK_SIZE // height + 2).astype(np.float32)[board]
    grain = np.sin(_ROWS * 1.1 + 6 * _noise(g, (10,), 0.3)) * 0.12 + 0.2 * _noise(g, (110, 70), 0.08)
    planks = _mix((118, 72, 36), (206, 150, 92), 0.5 + 0.16 * tone + grain)
    return np.where((_ROWS % height < 1.5)[..., None], _colour(70, 42, 24), planks)


def _road(g: np.random.Generator) -> Array:
    asphalt = _mix((62, 62, 68), (122, 122, 126), 0.5 + 0.15 * _noise(g, (4, 9)) + 0.3 * _noise(g, (112,)))
    slope, start = g.uniform(-0.3, 0.3), g.uniform(0.2, 0.5) * BANK_SIZE
    for line in (start, start + 85):
        stripe = (np.abs(_ROWS - line - slope * _COLUMNS) < 4) & (_COLUMNS % 44 < 28)
        asphalt = np.where(stripe[..., None], _colour(225, 222, 205), asphalt)
    return asphalt


def _forest(g: np.random.Generator) -> Array:
    leaves = _mix((14, 44, 24), (60, 108, 48), 0.45 + 0.35 * _noise(g, (14, 30, 60)))
    trunks = np.zeros((BANK_SIZE, BANK_SIZE), bool)
    for centre in g.uniform(0, BANK_SIZE, 7):
        trunks |= np.abs(_COLUMNS - centre - 5 * _noise(g, (3,))) < g.uniform(3, 7)
    bark = _mix((52, 36, 26), (98, 72, 52), 0.5 + 0.35 * _noise(g, (60,), 0.6))
    return np.where(trunks[..., None], bark, leaves)


def _desert(g: np.random.Generator) -> Array:
    ripples = np.sin(_ROWS / g.uniform(4, 7) + 4 * _noise(g, (4, 8))) * 0.18
    return _mix((178, 112, 58), (236, 186, 120), 0.5 + ripples + 0.2 * _noise(g, (5, 100)))


def _tiles(g: np.random.Generator) -> Array:
    side = int(g.integers(24, 36))
    dark = ((_ROWS // side + _COLUMNS // side) % 2).astype(np.float32)
    pale = [(206, 222, 226), (226, 214, 200), (208, 224, 206)][int(g.integers(3))]
    checks = _mix((246, 246, 243), pale, 0.9 * dark + 0.1 * _noise(g, (7, 14)))
    grout = (_ROWS % side < 2) | (_COLUMNS % side < 2)
    return np.where(grout[..., None], _colour(150, 154, 156), checks)


BACKGROUNDS: dict[str, Callable[[np.random.Generator], Array]] = {
    "meadow": _meadow,
    "snow": _snow,
    "beach": _beach,
    "water": _water,
    "brick wall": _brick,
    "wooden floor": _wood,
    "road": _road,
    "forest": _forest,
    "desert": _desert,
    "kitchen tiles": _tiles,
}


@cache
def background_bank(name: str) -> tuple[Image.Image, ...]:
    """The variants of one background, RGB, ``BANK_SIZE`` square; the same in every process."""
    seed = list(BACKGROUNDS).index(name)
    return tuple(
        Image.fromarray(
            np.clip(BACKGROUNDS[name](np.random.default_rng((seed, variant))), 0, 255).astype(np.uint8)
        )
        for variant in range(BANK_VARIANTS)
    )


def paint_background(name: str, size: int, generator: np.random.Generator) -> Image.Image:
    """A random cut of a random variant, mirrored half of the time."""
    bank = background_bank(name)[int(generator.integers(BANK_VARIANTS))]
    side = int(generator.integers(int(BANK_SIZE * 0.6), BANK_SIZE + 1))
    left, top = generator.integers(0, BANK_SIZE - side + 1, 2).tolist()
    cut = bank.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
    return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if generator.random() < 0.5 else cut


@cache
def _weather_bank(kind: str, size: int) -> tuple[Array, ...]:
    """Additive layers ``[size, size, 1]`` int16 of rain, snowfall or sensor noise."""
    generator = np.random.default_rng(sum(kind.encode()))
    layers = []
    for _ in range(8):
        if kind == "noise":
            layer = generator.normal(0, 5, (size, size))
        else:
            density, radius = (0.009, 0.4) if kind == "rain" else (0.0022, 0.9)
            drops = (generator.random((size * 2, size * 2)) < density) * 255.0
            mask = Image.fromarray(drops.astype(np.uint8))
            if kind == "rain":  # smear every drop along the wind
                streak = sum(
                    np.roll(drops.astype(np.uint8).astype(np.float32), (step, step // 3), (0, 1))
                    for step in range(14)
                )
                mask = Image.fromarray(np.clip(streak * 0.42, 0, 255).astype(np.uint8))
            else:
                mask = mask.filter(ImageFilter.MaxFilter(5))
            layer = np.asarray(mask.filter(ImageFilter.GaussianBlur(radius)).resize((size, size)), np.float32)
        layers.append(layer.astype(np.int16)[..., None])
    return tuple(layers)


# lighting -> (gain of red, green, blue; lift of all)
LIGHTINGS: dict[str, tuple[tuple[float, float, float], float]] = {
    "daylight": ((1.0, 1.0, 1.0), 0.0),
    "sunset": ((1.05, 0.78, 0.58), 10.0),
    "night": ((0.36, 0.42, 0.62), 4.0),
    "fog": ((0.42, 0.43, 0.44), 118.0),
    "rain": ((0.62, 0.68, 0.78), 0.0),
    "snowfall": ((0.84, 0.88, 0.94), 14.0),
}


def light(picture: Image.Image, name: str, generator: np.random.Generator) -> Array:
    """Uint8 ``[S, S, 3]``: gains and lift of the lighting, its weather, a little exposure jitter and sensor noise."""
    gains, lift = LIGHTINGS[name]
    exposure = generator.uniform(0.88, 1.12)
    tables = [
        np.clip(np.arange(256) * gain * exposure * generator.uniform(0.95, 1.05) + lift, 0, 255)
        for gain in gains
    ]
    pixels = np.asarray(picture.point(np.concatenate(tables).astype(np.uint8).tolist())).astype(np.int16)
    which = generator.integers(0, 8, 2)
    if name in ("rain", "snowfall"):
        layer = _weather_bank(name, picture.width)[which[0]]
        pixels += layer * 2 // 3 if name == "rain" else layer
    pixels += _weather_bank("noise", picture.width)[which[1]]
    return np.clip(pixels, 0, 255, out=pixels).astype(np.uint8)
