"""What look.py and compare.py draw with: pictures with titles, boxes, heat maps and lines, side by side; and charts."""
import math

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps

SIDE = 256  # of a picture on the page, in pixels
CHART, FRAME = (520, 350), (64, 58, 504, 304)  # the size of a chart, and the rectangle of its axes in it, xyxy
HEAT = ["#00007f", "#0040ff", "#00d0d0", "#ffe000", "#e00000"]  # the colors of a heat map, from 0 to 1
# The colors of lines and bars. Color-blind readers can tell them apart.
INK = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999"]


def picture(x, side=SIDE):
    """A PIL image, side x side pixels, of x, uint8 [3, S, S]."""
    return Image.fromarray(x.permute(1, 2, 0).cpu().numpy()).resize((side, side), Image.Resampling.BICUBIC)


def arrange(pictures, down=False, gap=8):
    """One picture of many, on white: side by side, or below each other if `down`, `gap` pixels apart."""
    pictures = list(pictures)
    widths, heights = zip(*(p.size for p in pictures))
    gaps = gap * (len(pictures) - 1)
    size = (max(widths), sum(heights) + gaps) if down else (sum(widths) + gaps, max(heights))
    sheet, start = Image.new("RGB", size, "white"), 0
    for p in pictures:
        sheet.paste(p, (0, start) if down else (start, 0))
        start += p.size[down] + gap
    return sheet


def titled(image, title):
    """The picture with a title above it."""
    sheet = ImageOps.expand(image, (0, 26, 0, 0), "white")
    ImageDraw.Draw(sheet).text((0, 4), title, "black", ImageFont.load_default(16))
    return sheet


def table(columns):
    """One picture of the columns {title: pictures from top to bottom}."""
    first, *rows = zip(*columns.values())
    return arrange([arrange(map(titled, first, columns)), *map(arrange, rows)], down=True)


def boxed(image, boxes, colors, labels=()):
    """The picture with boxes [n, 4], xyxy in its pixels, and their labels. They are drawn into `image` itself."""
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    for box, color in zip(boxes.tolist(), colors):
        pen.rectangle([*map(round, box)], outline=color, width=3)
    for (x, y, _, _), color, label in zip(boxes.tolist(), colors, labels):
        left, top, right, bottom = pen.textbbox((x + 4, y + 3), label, font)
        pen.rectangle([left - 3, top - 2, right + 2, bottom + 2], fill=color)
        pen.text((x + 4, y + 3), label, "black", font)
    return image


def heated(image, heat):
    """The picture under a heat map [S, S] of values in [0, 1]."""
    heat = np.asarray(Image.fromarray(heat.cpu().numpy()).resize(image.size, Image.Resampling.BILINEAR))
    colors = np.array([ImageColor.getrgb(color) for color in HEAT])
    heat = np.stack([np.interp(heat, np.linspace(0, 1, len(HEAT)), channel) for channel in colors.T], axis=2)
    return Image.blend(image, Image.fromarray(heat.astype(np.uint8)), 0.5)


def linked(left, right, starts, ends, found):
    """Two pictures with lines from `starts` in the left one to `ends` in the right one, green if `found`, else red.

    starts, ends: [n, 2], x and y in pixels of their picture; found: bool [n].
    """
    sheet = arrange([left, right])
    pen, shift = ImageDraw.Draw(sheet), sheet.width - right.width
    for good, start, (x, y) in sorted(zip(found.tolist(), starts.tolist(), ends.tolist())):  # the green ones on top
        color, line = "#00e000" if good else "#ff3030", [tuple(start), (x + shift, y)]
        pen.line(line, color, 1 + good)
        for x, y in line:
            pen.ellipse([x - 3, y - 3, x + 3, y + 3], color, "black")
    return sheet


def ticks(values):
    """About six round numbers at equal distances that span the values."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * abs(high):
        low, high = low - 0.5, high + 0.5
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(k * power for k in (1, 2, 2.5, 5, 10) if k * power >= (high - low) / 5 * (1 - 1e-9))
    return np.arange(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1) * step


def chart(title, lines, below):
    """A chart of `lines`, {name: (xs, ys)}; below: the name of the x axis."""
    left, top, right, bottom = FRAME
    sheet = Image.new("RGB", (CHART[0] * 2, CHART[1] * 2), "white")  # drawn twice as large, for smooth lines
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(26)
    text = lambda x, y, words, anchor: pen.text((2 * x, 2 * y), words, "black", font, anchor)
    line = lambda points, ink, width: pen.line([(2 * x, 2 * y) for x, y in points], ink, width, "curve")
    xs, ys = (ticks([value for points in lines.values() for value in points[k]]) for k in (0, 1))
    at_x = lambda x: left + (x - xs[0]) / (xs[-1] - xs[0]) * (right - left)
    at_y = lambda y: bottom - (y - ys[0]) / (ys[-1] - ys[0]) * (bottom - top)
    for x in xs:
        line([(at_x(x), bottom), (at_x(x), bottom + 4)], "gray", 2)
        text(at_x(x), bottom + 7, f"{x:.6g}", "ma")
    for y in ys:
        line([(left, at_y(y)), (right, at_y(y))], "gray" if y == ys[0] else "#dddddd", 2)
        text(left - 6, at_y(y), f"{y:.6g}", "rm")
    text(left, 10, title, "la")
    text((left + right) / 2, bottom + 25, below, "ma")
    legend, many = left, len(lines) > 5
    small = ImageFont.load_default(20 if many else 26)
    for k, (name, points) in enumerate(lines.items()):
        ink, points = INK[k % len(INK)], [(at_x(x), at_y(y)) for x, y in zip(*points)]
        line(points, ink, 4)
        for x, y in points if len(points) < 30 else ():
            pen.ellipse([2 * x - 6, 2 * y - 6, 2 * x + 6, 2 * y + 6], ink)
        if len(lines) > 1:
            line([(legend, 41), (legend + 16, 41)], ink, 6)
            pen.text((2 * legend + 42, 82), name, "black", small, "lm")
            legend += (29 if many else 40) + pen.textlength(name, small) / 2
    return sheet.reduce(2)


def histogram(values, below):
    """A chart of how the values [n] are distributed; below: what they are."""
    counts, edges = np.histogram(values, 20)
    return chart(f"Share; mean {values.mean():.3g}", {"": ((edges[1:] + edges[:-1]) / 2, counts / len(values))}, below)


def bars(title, values, order):
    """A bar chart with whiskers of `values`, {name: (mean, spread)}. A name's place in `order` gives its color."""
    left, top, right, bottom = FRAME
    sheet = Image.new("RGB", (CHART[0] * 2, CHART[1] * 2), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(24)
    text = lambda x, y, words, anchor, font=font: pen.text((2 * x, 2 * y), words, "black", font, anchor)
    ys = ticks([0, *(end for mean, spread in values.values() for end in (mean - spread, mean + spread))])
    at_y = lambda y: bottom - (y - ys[0]) / (ys[-1] - ys[0]) * (bottom - top)
    for y in ys:
        pen.line([2 * left, 2 * at_y(y), 2 * right, 2 * at_y(y)], "gray" if y == 0 else "#dddddd", 2)
        text(left - 6, at_y(y), f"{y:.6g}", "rm")
    text(left, 10, title, "la")
    step = (right - left) / len(values)
    widest = max(font.getlength(name) for name in values)
    small = ImageFont.load_default(24 * min(1, 1.9 * step / widest))  # names must not touch
    for k, (name, (mean, spread)) in enumerate(values.items()):
        middle = left + (k + 0.5) * step
        bar = [2 * (middle - 0.3 * step), 2 * at_y(mean), 2 * (middle + 0.3 * step), 2 * at_y(0)]
        pen.rectangle(bar, INK[order.index(name) % len(INK)])
        pen.line([2 * middle, 2 * at_y(mean - spread), 2 * middle, 2 * at_y(mean + spread)], "black", 4)
        text(middle, at_y(mean + spread) - 4, f"{mean:.3g}", "mb")
        text(middle, bottom + 7, name, "ma", small)
    return sheet.reduce(2)
