"""Seeded "dead leaves" scenes: images with the statistics of occlusion, drawn with numpy alone.

Opaque textured shapes with power-law radii are dropped on one another over a textured ground. Occlusion gives such
scenes the sharp edges, the piecewise texture and the roughly 1/f spectrum of natural images (Lee, Mumford and Huang,
"Occlusion models for natural images", IJCV 2001). Colours vary in luminance much more than in hue: a small tokenizer
then spends its codes on shape and texture instead of on colour.

A scene is a pure function of (seed, index): any image can be drawn again alone. Lengths are in 64ths of the image
side ("units"), so one scene looks the same at every resolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

# Shapes: signed distance in units of the radius, negative inside.


def disk(x: Floats, y: Floats) -> Floats:
    return np.sqrt(x * x + y * y) - np.float32(0.85)


def square(x: Floats, y: Floats) -> Floats:
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.76)


def triangle(x: Floats, y: Floats) -> Floats:
    slanted = np.float32(3**0.5 / 2) * np.abs(x) + np.float32(0.5) * y
    return np.maximum(slanted, -y) - np.float32(0.56)


def star(x: Floats, y: Floats) -> Floats:
    """Five points; folded into one half point, where the outline is a straight edge."""
    sector = np.float32(2 * np.pi / 5)
    angle = np.arctan2(y, x)
    angle = np.abs(angle - sector * np.round(angle / sector))
    radius = np.sqrt(x * x + y * y)
    tip, notch = 1.08, 0.45 * np.exp(1j * np.pi / 5)
    normal = np.array([notch.imag, tip - notch.real]) / abs(notch - tip)
    along_normal = np.float32(normal[0]) * np.cos(angle) + np.float32(normal[1]) * np.sin(angle)
    return np.asarray(radius * along_normal - np.float32(tip * normal[0]), np.float32)


def plus(x: Floats, y: Floats) -> Floats:
    ax, ay = np.abs(x), np.abs(y)
    return np.minimum(
        np.maximum(ax - np.float32(0.33), ay - np.float32(1.0)), np.maximum(ay - np.float32(0.33), ax - np.float32(1.0))
    )


def ring(x: Floats, y: Floats) -> Floats:
    return np.abs(np.sqrt(x * x + y * y) - np.float32(0.68)) - np.float32(0.25)


SHAPES: tuple[Callable[[Floats, Floats], Floats], ...] = (disk, square, triangle, star, plus, ring)

# Textures: share of the second colour, in [0, 1], edges one pixel wide.


def plane_waves(x: Floats, y: Floats, kx: Floats, ky: Floats, phase: Floats) -> Floats:
    """sum_w cos(kx_w x + ky_w y + phase_w) on the grid (len(y), len(x)): separable, hence one small matrix product."""
    ax = np.outer(x, kx) + phase  # (X, W)
    ay = np.outer(y, ky)  # (Y, W)
    along_y = np.concatenate([np.cos(ay), -np.sin(ay)], axis=1)
    along_x = np.concatenate([np.cos(ax), np.sin(ax)], axis=1)
    return along_y @ along_x.T


def _pair(u: Floats, period: float) -> tuple[Floats, Floats, Floats]:
    """Wave vectors and phases of two waves at a right angle."""
    angle = 2 * np.pi * u[0]
    k = 2 * np.pi / period
    kx = np.array([np.cos(angle), -np.sin(angle)], np.float32) * np.float32(k)
    ky = np.array([np.sin(angle), np.cos(angle)], np.float32) * np.float32(k)
    return kx, ky, np.float32(2 * np.pi) * u[1:3]


def _edge(field: Floats, period: float) -> Floats:
    """Threshold at zero with a ramp of one pixel: there, a wave of this period rises by 2 pi / period per pixel."""
    return _unit(field * np.float32(period / (2 * np.pi)) + np.float32(0.5))


def stripes(x: Floats, y: Floats, period: float, u: Floats) -> Floats:
    kx, ky, phase = _pair(u, period)
    return _edge(plane_waves(x, y, kx[:1], ky[:1], phase[:1]), period)


def checker(x: Floats, y: Floats, period: float, u: Floats) -> Floats:
    kx, ky, phase = _pair(u, 1.3 * period)
    first = plane_waves(x, y, kx[:1], ky[:1], phase[:1])
    return _edge(first * plane_waves(x, y, kx[1:], ky[1:], phase[1:]), period)


def dots(x: Floats, y: Floats, period: float, u: Floats) -> Floats:
    kx, ky, phase = _pair(u, period)
    return _edge(plane_waves(x, y, kx, ky, phase) - np.float32(0.7), period)


def blotches(x: Floats, y: Floats, period: float, u: Floats) -> Floats:
    """A thresholded random field: eight waves of random direction and similar length."""
    angle = np.float32(2 * np.pi) * u[:8]
    k = np.float32(2 * np.pi / (1.25 * period)) * (np.float32(0.5) + u[8:16])
    phase = np.float32(2 * np.pi) * u[16:24]
    return _edge(plane_waves(x, y, k * np.cos(angle), k * np.sin(angle), phase), period)


TEXTURES: tuple[Callable[[Floats, Floats, float, Floats], Floats], ...] = (stripes, checker, dots, blotches)
HUES = {"orange": (1, -1), "magenta": (1, 1), "blue": (-1, 1), "green": (-1, -1)}
"""Directions of the red and the blue channel; the green one keeps the luminance."""
NUM_CLASSES = len(SHAPES) * len(TEXTURES)
SURFACES = ("ground", *(f"plain {shape.__name__}" for shape in SHAPES), *(texture.__name__ for texture in TEXTURES))
"""What a pixel can show, by its number in label maps: the ground, a plain leaf of some shape, or a texture."""


@dataclass(frozen=True)
class SceneStyle:
    """What a scene is made of; lengths in 64ths of the image side."""

    leaves: tuple[int, int]
    leaf_radius: tuple[float, float]
    object_radius: tuple[float, float]
    textured_share: float
    """Share of the leaves that bear a texture; the others are shaded only."""
    object_hues: bool = False
    """Whether the object has one of four hues, which then is part of its class in place of the texture."""


CLUTTERED = SceneStyle(leaves=(9, 17), leaf_radius=(4.5, 22.0), object_radius=(15.0, 23.0), textured_share=0.7)
"""For pre-training: textured clutter, so every patch has content and most have a context that explains it."""

LABELLED = SceneStyle(leaves=(3, 8), leaf_radius=(4.5, 22.0), object_radius=(18.0, 26.0), textured_share=0.0)
"""For the 24 classes: only the object on top bears one of the four textures, so the label can be read off."""

HUED = replace(LABELLED, object_hues=True)
"""For 24 classes that are easy in part: the object has any texture and one of four hues, which a mean colour tells."""

_PER_SURFACE = 48  # uniforms drawn for one surface, used or not: a scene is then one draw


class _Canvas:
    """An image under construction: planar float32 (3, size, size), light in [0, 1]."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.unit = size / 64  # pixels per unit
        self.pixels = np.zeros((3, size, size), np.float32)
        self.surfaces = np.zeros((size, size), np.uint8)  # the ground
        self.centres = np.arange(size, dtype=np.float32) + np.float32(0.5)

    def surface(self, x: Floats, y: Floats, u: Floats, texture: int | None, hue: int | None = None) -> Floats:
        """Colours (3, Y, X) of a textured and shaded surface over the pixel centres x, y."""
        first, second = _colours(u[0:8].tolist(), hue)
        strength, angle = 0.35 * float(u[9]), 2 * math.pi * float(u[10])
        half_x, half_y = len(x) / 2, len(y) / 2
        light_x = (x - (x[0] + np.float32(half_x))) * np.float32(0.5 * strength * math.cos(angle) / half_x)
        light_y = (y - (y[0] + np.float32(half_y))) * np.float32(0.5 * strength * math.sin(angle) / half_y)
        light = np.add.outer(light_y + np.float32(1), light_x)
        if texture is None:
            return first * light
        period = (6 + 5 * float(u[8])) * self.unit
        share = TEXTURES[texture](x, y, period, u[24:48])
        return first * light + (second - first) * (share * light)

    def drop(
        self, radius: float, stretch: float, u: Floats, shape: int, texture: int | None, hue: int | None = None
    ) -> None:
        """Paint one shape (radius in units) and the shadow that it casts around itself."""
        radius *= self.unit
        shadow_width = min(4 * self.unit, 0.4 * radius)
        reach = 1.15 * radius * math.exp(abs(stretch)) + 2 * shadow_width
        cx, cy = float(u[11]) * self.size, float(u[12]) * self.size
        x0, x1 = max(int(cx - reach), 0), min(int(cx + reach) + 2, self.size)
        y0, y1 = max(int(cy - reach), 0), min(int(cy + reach) + 2, self.size)
        if x0 >= x1 or y0 >= y1:
            return
        x, y = self.centres[x0:x1], self.centres[y0:y1]
        angle = 2 * math.pi * float(u[13])
        cos, sin, stretch = math.cos(angle) / radius, math.sin(angle) / radius, math.exp(stretch)
        dx, dy = x - np.float32(cx), y - np.float32(cy)
        along = np.add.outer(dy * np.float32(sin * stretch), dx * np.float32(cos * stretch))
        across = np.add.outer(dy * np.float32(cos / stretch), dx * np.float32(-sin / stretch))
        distance = SHAPES[shape](along, across) * np.float32(radius)  # pixels
        cover = _unit(np.float32(0.5) - distance)
        shade = _unit(np.float32(1) - distance * np.float32(1 / shadow_width))
        below = self.pixels[:, y0:y1, x0:x1]
        # cover * surface + (1 - cover) * below, where the shadow takes up to 45 % of the light below
        below *= (np.float32(1) - np.float32(0.45) * shade) * (np.float32(1) - cover)
        below += cover * self.surface(x, y, u, texture, hue)
        self.surfaces[y0:y1, x0:x1][cover >= 0.5] = 1 + (shape if texture is None else len(SHAPES) + texture)


def _unit(values: Floats) -> Floats:
    """Clip to [0, 1] in place (np.clip costs several times as much on small arrays)."""
    np.maximum(values, np.float32(0), out=values)
    return np.minimum(values, np.float32(1), out=values)


def _colours(u: list[float], hue: int | None) -> tuple[Floats, Floats]:
    """Two RGB colours (3, 1, 1): luminances in [.08, .92] at least .3 apart, chroma within .07 of grey or of `hue`."""
    red_of_hue, blue_of_hue = (0, 0) if hue is None else list(HUES.values())[hue]
    low = 0.08 + 0.54 * u[0]
    high = low + 0.3 + (0.92 - low - 0.3) * u[1]
    colours = []
    for luminance, red, blue in ((low, u[3], u[4]), (high, u[5], u[6])):
        # Red and blue move freely, green keeps the luminance (ITU-R 601 weights).
        red, blue = 0.12 * red_of_hue + 0.14 * (red - 0.5), 0.12 * blue_of_hue + 0.14 * (blue - 0.5)
        green = -(0.299 * red + 0.114 * blue) / 0.587
        colours.append(np.array([luminance + red, luminance + green, luminance + blue], np.float32)[:, None, None])
    return (colours[0], colours[1]) if u[2] < 0.5 else (colours[1], colours[0])


def generator(seed: int, index: int) -> np.random.Generator:
    """The random stream of one image; streams of different (seed, index) are independent."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64)))


class Scene(NamedTuple):
    """A drawn scene and what is known about it."""

    pixels: NDArray[np.uint8]
    """(size, size, 3)"""
    number: int
    """Class of its object in [0, 24): `4 * shape + texture`, or `4 * shape + hue` where objects have hues."""
    surfaces: NDArray[np.uint8]
    """(size, size): which of `SURFACES` covers at least half of each pixel."""


def draw_scene(rng: np.random.Generator, size: int, style: SceneStyle = CLUTTERED) -> Scene:
    """Draw one scene."""
    head = rng.random(8, dtype=np.float32)
    num_leaves = style.leaves[0] + int(head[0] * (style.leaves[1] - style.leaves[0]))
    u = rng.random((num_leaves + 2, _PER_SURFACE), dtype=np.float32)
    canvas = _Canvas(size)
    ground_texture = int(u[0, 14] * 4) if style.textured_share else None
    canvas.pixels[:] = canvas.surface(canvas.centres, canvas.centres, u[0], ground_texture)
    smallest, largest = style.leaf_radius
    for row in u[1:-1]:
        # Pareto radii, density ~ r^-2.7: the range [4.5, 22] of the default is cut at the 93rd percentile.
        radius = min(smallest * (1 - 0.93 * float(row[15])) ** -0.6, largest) * 1.2
        texture = int(row[16] * 4) if row[17] < style.textured_share else None
        canvas.drop(radius, 0.7 * (float(row[18]) - 0.5), row, int(row[19] * 6), texture)
    top = u[-1]
    shape, texture, hue = int(head[1] * 6), int(head[2] * 4), int(head[4] * 4) if style.object_hues else None
    near, far = style.object_radius
    top[11:13] = 0.5 + (top[11:13] - 0.5) * 0.4  # the object stays in the middle of the image
    canvas.drop(near + (far - near) * float(top[15]), 0.24 * (float(top[18]) - 0.5), top, shape, texture, hue)
    gain = np.float32(0.75 + 0.4 * float(head[3]))
    image = canvas.pixels
    image *= gain * np.float32(255)
    image += rng.standard_normal((3, size, size), dtype=np.float32) * np.float32(0.015 * 255)
    np.maximum(image, np.float32(0), out=image)
    np.minimum(image, np.float32(254.5), out=image)
    image += np.float32(0.5)
    pixels = np.ascontiguousarray(image.astype(np.uint8).transpose(1, 2, 0))
    return Scene(pixels, 4 * shape + (texture if hue is None else hue), canvas.surfaces)


def labelled_class(index: int, seed: int, style: SceneStyle = LABELLED) -> int:
    """The class of `render_scene(index, seed, ..., style)` without drawing it."""
    head = generator(seed, index).random(8, dtype=np.float32)
    return 4 * int(head[1] * 6) + int(head[4 if style.object_hues else 2] * 4)


def render_labelled(index: int, seed: int, size: int) -> tuple[NDArray[np.uint8], int]:
    """One labelled scene, uint8 (size, size, 3), and its class in [0, 24); a pure function of its arguments."""
    return render_scene(index, seed, size)[:2]


def render_scene(index: int, seed: int, size: int, style: SceneStyle = LABELLED) -> Scene:
    """The same labelled scene with all that is known about it, label map included."""
    return draw_scene(generator(seed, index), size, style)
