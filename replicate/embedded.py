"""Image sets drawn by the code itself: they need no network, no GPU and no data on disk.

`embedded_objects` draws ten classes of upright objects of two to five simple parts in front of
textured clutter; `embedded_digits` the digits 0-9 as strokes, plain or blended into a texture.

An image set is a function of its arguments alone.  Every random number comes from a CPU generator
made here, and whatever touches a pixel is addition, multiplication, division, square root,
comparison or rounding, elementwise: IEEE 754 fixes each of these to the bit, so the bytes depend
neither on threads nor on vector units.  That is why waves are parabolas and rotations rational.

Scenes live in coordinates from -1 to 1 with y pointing down: a seed's scene is the same at any
size.
"""
import math
from typing import NamedTuple

import torch

CHUNK = 256  # images drawn at once; independent of the size, which may not change the scene


class Part(NamedTuple):
    """One part of an object: shape, centre, half extents, mean colour (hue, saturation, value)."""
    shape: str
    x: float
    y: float
    half_width: float
    half_height: float
    color: tuple


# Mean colours.  Classes share them, and every image moves its hues: colour helps, no more.
RED, ORANGE, YELLOW = (0.0, 0.75, 0.8), (0.08, 0.75, 0.8), (0.15, 0.75, 0.8)
GREEN, BLUE, PURPLE = (0.33, 0.75, 0.8), (0.6, 0.75, 0.8), (0.8, 0.75, 0.8)
WOOD, CREAM, DARK, STEEL = (0.08, 0.6, 0.5), (0.11, 0.3, 0.95), (0.6, 0.3, 0.2), (0.58, 0.2, 0.7)

# Later parts cover earlier ones.  Several classes are the same parts in another layout (tree, lamp,
# mushroom: a cap on a stem; house, sailboat, rocket, ice cream: a triangle and a body), so that the
# layout has to be seen.
OBJECTS = {
    "house": [
        Part("triangle", 0, -0.55, 0.9, 0.4, RED), Part("box", 0, 0.4, 0.68, 0.55, CREAM),
        Part("box", -0.28, 0.58, 0.17, 0.37, WOOD), Part("box", 0.28, 0.28, 0.18, 0.18, BLUE)],
    "tree": [
        Part("box", 0, 0.72, 0.13, 0.28, WOOD), Part("triangle", 0, 0.08, 0.72, 0.48, GREEN),
        Part("triangle", 0, -0.5, 0.52, 0.45, GREEN)],
    "rocket": [
        Part("triangle", 0, 0.62, 0.62, 0.33, RED), Part("box", 0, 0.1, 0.3, 0.65, STEEL),
        Part("triangle", 0, -0.75, 0.3, 0.25, RED), Part("ellipse", 0, -0.18, 0.17, 0.17, BLUE)],
    "ice cream": [
        Part("wedge", 0, 0.4, 0.45, 0.6, ORANGE), Part("ellipse", 0, -0.35, 0.52, 0.45, CREAM),
        Part("ellipse", 0.05, -0.82, 0.15, 0.15, RED)],
    "mushroom": [
        Part("box", 0, 0.45, 0.24, 0.5, CREAM), Part("dome", 0, 0.1, 0.85, 0.9, RED),
        Part("ellipse", -0.32, -0.2, 0.15, 0.15, CREAM),
        Part("ellipse", 0.3, -0.3, 0.15, 0.15, CREAM)],
    "sailboat": [
        Part("bowl", 0, 0.42, 0.9, 0.52, WOOD), Part("box", 0, -0.2, 0.06, 0.75, DARK),
        Part("triangle", 0.32, -0.28, 0.4, 0.58, YELLOW)],
    "car": [
        Part("box", -0.08, -0.22, 0.52, 0.32, BLUE), Part("box", 0, 0.25, 0.95, 0.26, BLUE),
        Part("ellipse", -0.52, 0.55, 0.25, 0.25, DARK),
        Part("ellipse", 0.52, 0.55, 0.25, 0.25, DARK)],
    "person": [
        Part("box", -0.2, 0.68, 0.14, 0.32, BLUE), Part("box", 0.2, 0.68, 0.14, 0.32, BLUE),
        Part("box", 0, -0.08, 0.62, 0.12, PURPLE), Part("box", 0, 0.08, 0.36, 0.36, PURPLE),
        Part("ellipse", 0, -0.62, 0.28, 0.32, ORANGE)],
    "lamp": [
        Part("box", 0, 0.25, 0.08, 0.65, STEEL), Part("triangle", 0, -0.5, 0.75, 0.45, YELLOW),
        Part("box", 0, 0.84, 0.5, 0.12, STEEL)],
    "cup": [
        Part("ring", 0.55, 0.15, 0.36, 0.36, PURPLE), Part("box", -0.1, 0.2, 0.55, 0.6, PURPLE),
        Part("ellipse", -0.1, -0.4, 0.55, 0.17, WOOD)],
}


def _arc(x, y, radius_x, radius_y, start, stop, points=9):
    """Points on an ellipse, angles in degrees, clockwise on the screen from the right-hand end.

    Rounded, because the last bit of a cosine is not the same on all machines.
    """
    made = []
    for index in range(points):
        angle = math.radians(start + (stop - start) * index / (points - 1))
        across, down = radius_x * math.cos(angle), radius_y * math.sin(angle)
        made.append((round(x + across, 4), round(y + down, 4)))
    return made


# One list of strokes a digit, a stroke a list of points joined by straight lines.
DIGITS = [
    [_arc(0, 0, 0.55, 0.9, -90, 270, 15)],
    [[(-0.35, -0.55), (0.1, -0.9), (0.1, 0.9)]],
    [_arc(0, -0.4, 0.5, 0.5, -170, 40) + [(-0.55, 0.9), (0.6, 0.9)]],
    [_arc(-0.05, -0.45, 0.5, 0.45, -150, 90) + _arc(-0.05, 0.45, 0.58, 0.45, -90, 150)],
    [[(0.3, 0.9), (0.3, -0.9), (-0.6, 0.3), (0.65, 0.3)]],
    [[(0.5, -0.9), (-0.4, -0.9), (-0.45, -0.1)] + _arc(-0.05, 0.35, 0.55, 0.52, -130, 140)],
    [[(0.35, -0.9), (-0.2, -0.35)] + _arc(0, 0.4, 0.5, 0.5, 200, 560, 12)],
    [[(-0.55, -0.85), (0.55, -0.85), (-0.1, 0.9)]],
    [_arc(0, -0.45, 0.42, 0.42, 90, 450, 11), _arc(0, 0.45, 0.52, 0.45, -90, 270, 11)],
    [_arc(0, -0.4, 0.48, 0.48, 0, 360, 12) + [(0.4, 0.9)]],
]


def embedded_objects(count, seed, size=32):
    """Draw `count` coloured images of ten object classes, each upright within 12 degrees.

    Returns uint8 images (count, 3, size, size) and int64 labels (count,), balanced up to one and
    shuffled; label k is the k-th key of `OBJECTS`.  Raises ValueError for a count below 1, a seed
    outside 0..2^31-1 or a size outside 16..128.
    """
    labels, scene, noise = _begin(count, seed, size, len(OBJECTS))
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    for start in range(0, count, CHUNK):
        images[start:start + CHUNK] = _draw_objects(labels[start:start + CHUNK], size, scene, noise)
    return images, labels


def embedded_digits(count, seed, blended=False, size=28):
    """Draw `count` stroke digits, white on black, or blended into a random coloured texture.

    Returns uint8 images (count, 1, size, size), or (count, 3, size, size) if `blended`, and int64
    labels (count,), balanced up to one and shuffled.  Blending takes |texture - digit| in every
    channel, as MNIST-M is made (Ganin et al. 2016, Sec. 5.2.4).  Errors as in `embedded_objects`.
    """
    labels, scene, texture = _begin(count, seed, size, len(DIGITS))
    images = torch.empty(count, 3 if blended else 1, size, size, dtype=torch.uint8)
    for start in range(0, count, CHUNK):
        chunk_labels = labels[start:start + CHUNK]
        digits = _to_bytes(_draw_digits(chunk_labels, size, scene))
        if blended:
            digits = _blend(digits, _to_bytes(_draw_background(len(chunk_labels), size, texture)))
        images[start:start + CHUNK] = digits
    return images, labels


def _begin(count, seed, size, classes):
    """Check the arguments; return shuffled labels and generators of the scene and its cover."""
    # The generator keeps 32 bits of its seed: a larger one would repeat a smaller one's images.
    limits = (("count", count, 1, 2**31 - 1), ("seed", seed, 0, 2**31 - 1), ("size", size, 16, 128))
    for name, value, low, high in limits:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"{name} must be a whole number from {low} to {high}, not {value!r}")
    scene, cover = (torch.Generator().manual_seed(2 * seed + offset) for offset in (0, 1))
    labels = torch.arange(count) % classes
    return labels[torch.randperm(count, generator=scene)], scene, cover


def _draw_objects(labels, size, scene, noise):
    """Scenes for (N,) labels: background, clutter, object, occluder, light, noise; (N,3,H,W)."""
    count = len(labels)
    canvas = _draw_background(count, size, scene)
    for _ in range(4):
        _scatter_blob(canvas, scene, probability=0.75, extent=(0.1, 0.45), reach=1.0)

    for label, parts in enumerate(OBJECTS.values()):
        members = (labels == label).nonzero()[:, 0]
        if len(members):
            canvas[members] = _paint_object(canvas[members], parts, scene)
    _scatter_blob(canvas, scene, probability=0.3, extent=(0.12, 0.3), reach=0.7)

    row, _ = _grid(size)
    # The sky is brighter more often than not, never reliably: light alone must not tell what is up.
    canvas *= 1 - row * _uniform(scene, (count, 1, 1, 1), -0.2, 0.3)
    contrast = _uniform(scene, (count, 1, 1, 1), 0.5, 1.1)
    brightness = _uniform(scene, (count, 1, 1, 1), -0.12, 0.12)
    canvas = (canvas - 0.5) * contrast + (0.5 + brightness)
    strength = _uniform(scene, (count, 1, 1, 1), 0.03, 0.12)
    # Grey noise: it hides shapes from every method alike, and leaves the colours to be predicted.
    grain = torch.rand(2, count, 1, size, size, generator=noise)
    return _to_bytes(canvas + (grain[0] + grain[1] - 1) * strength)


def _paint_object(canvas, parts, scene):
    """Paint one object on each canvas (N,3,H,W): random place, size, tilt, flip, shape and hues."""
    count, size = len(canvas), canvas.shape[-1]
    scale = _uniform(scene, (count, 1, 1), 0.42, 0.8)
    tilt = _uniform(scene, (count, 1, 1), -0.105, 0.105)  # tangent of half of 12 degrees
    flip = _sign(scene, (count, 1, 1))
    x, y = _local_grid(size, _uniform(scene, (2, count, 1, 1), -0.5, 0.5) * (1.1 - scale), tilt)
    x, y = x * flip / scale, y / scale
    hue_shift = _uniform(scene, (count, 1), -0.15, 0.15)
    # A fifth of the objects wear any hue at all.
    hue_shift += (_uniform(scene, (count, 1), 0, 1) < 0.2) * _uniform(scene, (count, 1), -0.5, 0.5)
    for part in parts:
        shift_x, shift_y = _uniform(scene, (2, count, 1, 1), -0.07, 0.07)
        stretch_x, stretch_y = _uniform(scene, (2, count, 1, 1), 0.8, 1.2)
        distance = _distance(part.shape, x - (part.x + shift_x), y - (part.y + shift_y),
                             part.half_width * stretch_x, part.half_height * stretch_y)
        hue, saturation, value = part.color
        color = _rgb(hue + hue_shift + _uniform(scene, (count, 1), -0.05, 0.05),
                     saturation * _uniform(scene, (count, 1), 0.5, 1.2),
                     value * _uniform(scene, (count, 1), 0.6, 1.2))
        _paint(canvas, distance * scale, color)
    return canvas


def _scatter_blob(canvas, scene, probability, extent, reach):
    """Paint a blob of a random turn, colour and shape on each canvas, with this probability."""
    count, size = len(canvas), canvas.shape[-1]
    center = _uniform(scene, (2, count, 1, 1), -reach, reach)
    x, y = _local_grid(size, center, _uniform(scene, (count, 1, 1), -1, 1))
    y = y * _sign(scene, (count, 1, 1))
    width, height = _uniform(scene, (2, count, 1, 1), *extent)
    opacity = (_uniform(scene, (count, 1, 1), 0, 1) < probability).float()
    shapes = ("ellipse", "box", "triangle", "dome")
    choice = torch.randint(len(shapes), (count,), generator=scene)
    # Each shape has a hue of its own, widely spread: something else for colorization to find.
    color = _rgb(choice[:, None] / len(shapes) + _uniform(scene, (count, 1), -0.1, 0.1),
                 *_uniform(scene, (2, count, 1), 0, 1))
    distance = torch.empty(count, size, size)
    for index, shape in enumerate(shapes):
        here = choice == index
        distance[here] = _distance(shape, x[here], y[here], width[here], height[here])
    _paint(canvas, distance, color, opacity)


def _draw_background(count, size, generator):
    """Two-coloured textures (count,3,size,size) in 0..1, between stripes any way and smooth noise.

    Stripes tend to warm hues and noise to cool ones: grey values tell something about the colours.
    """
    turn = _uniform(generator, (count, 1, 1), -1, 1)
    row, _ = _local_grid(size, torch.zeros(2, count, 1, 1), turn)
    frequency = _uniform(generator, (count, 1, 1), 0.7, 3.5)
    phase = row * frequency + _uniform(generator, (count, 1, 1), 0, 1)
    phase = 2 * (phase - phase.floor()) - 1
    stripes = 2 * phase * (1 - phase.abs()) + 0.5  # a parabola's likeness of a sine, 0..1
    coarse = 0.6 * _value_noise(count, 4, size, generator)
    noise = coarse + 0.4 * _value_noise(count, 9, size, generator)
    striped = _uniform(generator, (count, 1, 1), 0, 1)
    striped = striped * striped * (3 - 2 * striped)  # most textures are clearly one of the two
    pattern = (noise + striped * (stripes - noise))[:, None]
    hues = 0.55 - 0.45 * striped[:, 0] + _uniform(generator, (2, count, 1), -0.1, 0.1)
    first, second = (_rgb(hue, _uniform(generator, (count, 1), 0.3, 0.7),
                          _uniform(generator, (count, 1), 0.2, 1)) for hue in hues)
    return first + (second - first) * pattern


def _value_noise(count, cells, size, generator):
    """Smoothly interpolated random grids, (count, size, size) in 0..1."""
    # The rounding of torch's interpolate depends on the number of threads.
    grid = torch.rand(count, cells + 1, cells + 1, generator=generator)
    position = (torch.arange(size) + 0.5) * cells / size
    index = position.long()
    weight = position - index
    weight = weight * weight * (3 - 2 * weight)
    rows = grid[:, index] + (grid[:, index + 1] - grid[:, index]) * weight[:, None]
    return rows[:, :, index] + (rows[:, :, index + 1] - rows[:, :, index]) * weight


def _draw_digits(labels, size, scene):
    """Anti-aliased strokes for (N,) labels, (N,1,size,size) in 0..1, under random affine maps."""
    images = torch.empty(len(labels), 1, size, size)
    row, column = _grid(size)
    for label, strokes in enumerate(DIGITS):
        members = (labels == label).nonzero()[:, 0]
        count = len(members)
        scale_x, scale_y = _uniform(scene, (2, count, 1), 0.5, 0.8)
        slant, turn = _uniform(scene, (2, count, 1), -0.25, 0.25)
        offset_x, offset_y = _uniform(scene, (2, count, 1), -0.14, 0.14)
        thickness = _uniform(scene, (count, 1, 1), 0.06, 0.14)
        distance = torch.full((count, size, size), 9.0)
        for stroke in strokes:
            points = torch.tensor(stroke) + _uniform(scene, (count, len(stroke), 2), -0.05, 0.05)
            glyph_x, glyph_y = points.unbind(-1)
            x = scale_x * (glyph_x - slant * glyph_y) + offset_x  # (N, points)
            y = scale_y * (glyph_y + turn * glyph_x) + offset_y
            for end in range(1, len(stroke)):
                start_x, start_y = x[:, end - 1, None, None], y[:, end - 1, None, None]
                along_x, along_y = x[:, end, None, None] - start_x, y[:, end, None, None] - start_y
                from_x, from_y = column - start_x, row - start_y
                squared = along_x * along_x + along_y * along_y + 1e-8
                nearest = ((from_x * along_x + from_y * along_y) / squared).clamp(0, 1)
                gap_x, gap_y = from_x - nearest * along_x, from_y - nearest * along_y
                distance = torch.minimum(distance, gap_x * gap_x + gap_y * gap_y)
        images[members, 0] = _coverage(distance.sqrt() - thickness, size)
    return images


def _blend(digits, patches):
    """|patch - digit| in every channel of uint8 digits (N,1,H,W) and patches (N,3,H,W)."""
    return (patches.short() - digits.short()).abs().to(torch.uint8)


def _distance(shape, x, y, half_width, half_height):
    """Signed distance to a shape's outline, negative inside.

    A wedge is a triangle upside down; a dome is the upper half of an ellipse (its centre is on the
    flat side), a bowl the lower half; a ring is an ellipse drawn with a stroke of fixed width.
    """
    if shape in ("wedge", "bowl"):
        return _distance("triangle" if shape == "wedge" else "dome", x, -y, half_width, half_height)
    if shape == "box":
        return torch.maximum(x.abs() - half_width, y.abs() - half_height)
    if shape == "triangle":
        slope = (4 * half_height * half_height + half_width * half_width).sqrt()
        side = (x.abs() * (2 * half_height) - half_width * (y + half_height)) / slope
        return torch.maximum(side, y - half_height)
    scaled_x, scaled_y = x / half_width, y / half_height
    # Exact for circles; for ellipses it is close enough to smooth an edge one pixel wide.
    radius = (scaled_x * scaled_x + scaled_y * scaled_y).sqrt()
    ellipse = (radius - 1) * torch.minimum(half_width, half_height)
    if shape == "ring":
        return ellipse.abs() - 0.1
    return torch.maximum(ellipse, y) if shape == "dome" else ellipse


def _paint(canvas, distance, color, opacity=1):
    """Cover a canvas (N,3,H,W), in place, with colours (N,3,1,1) where distance (N,H,W) < 0."""
    canvas += (color - canvas) * (_coverage(distance, canvas.shape[-1]) * opacity)[:, None]


def _coverage(distance, size):
    """The fraction of each pixel inside an outline, from its centre's distance in scene units."""
    return (0.5 - distance * (size / 2)).clamp(0, 1)


def _grid(size):
    """Rows (size, 1) and columns (1, size) of pixel centres in -1..1."""
    centers = (torch.arange(size) + 0.5) * 2 / size - 1
    return centers[:, None], centers[None, :]


def _local_grid(size, center, half_tangent):
    """Pixel centres x, y (N,H,W), seen from centres (2,N,1,1), turned by 2 atan(half_tangent)."""
    row, column = _grid(size)
    squared = half_tangent * half_tangent
    cosine, sine = (1 - squared) / (1 + squared), 2 * half_tangent / (1 + squared)
    x, y = column - center[0], row - center[1]
    return x * cosine + y * sine, y * cosine - x * sine


def _rgb(hue, saturation, value):
    """Colours (N,3,1,1) from hue, in turns, saturation and value, each (N,1); clamped to 0..1."""
    sixths = (hue + torch.tensor([1.0, 2 / 3, 1 / 3])) * 6
    sixths = sixths - 6 * (sixths / 6).floor()
    pure = ((sixths - 3).abs() - 1).clamp(0, 1)
    return (value.clamp(0, 1) * (1 - saturation.clamp(0, 1) * (1 - pure)))[:, :, None, None]


def _uniform(generator, shape, low, high):
    return torch.rand(shape, generator=generator) * (high - low) + low


def _sign(generator, shape):
    return 2 * torch.randint(2, shape, generator=generator) - 1


def _to_bytes(images):
    return (images * 255 + 0.5).clamp(0, 255).to(torch.uint8)
