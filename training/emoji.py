"""The picture set of the reference models: 64x64 pictures of Noto emoji on white, with their Unicode names.

Two sources give the same pictures but for resampling (mean difference 2 of 255): the colour-bitmap font of the Debian
package `fonts-noto-color-emoji`
(`--font FILE`), or a folder that holds `noto_emoji_72.npz` (`--data DIR`: `images` uint8 [n, 72, 72, 4] RGBA and
`captions`, made from the same project's PNG files). The chosen captions stand in `src/difloat/assets/captions.txt`.

    python training/emoji.py --font /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf --out emoji64.npz
"""

from __future__ import annotations

import argparse
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 64
STRIKE = 109  # the only size of the font's embedded bitmaps
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
ASSETS = Path(__file__).resolve().parents[1] / "src" / "difloat" / "assets"


def captions() -> list[str]:
    """Returns the chosen captions, in the order of the training set."""
    return (ASSETS / "captions.txt").read_text(encoding="utf-8").split("\n")[:-1]


def on_white(picture: Image.Image) -> np.ndarray:
    """Composites an RGBA picture on white and scales it: uint8 [64, 64, 3]."""
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    white.alpha_composite(picture)
    return np.asarray(white.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def glyph(character: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """Draws one character's colour bitmap, centred in a square: RGBA [128, 128]."""
    canvas = Image.new("RGBA", (192, 192), (0, 0, 0, 0))
    draw = ImageDraw.Draw(canvas)
    draw.text((24, 24), character, font=font, embedded_color=True)
    if canvas.getbbox() is None:
        name = unicodedata.name(character)
        raise ValueError(f"the font must hold a bitmap for {name!r}, got an empty glyph")
    # The box of the bitmap, empty borders included: centring what is drawn would move pictures that sit off centre.
    left, top, right, bottom = draw.textbbox((24, 24), character, font=font, embedded_color=True)
    x, y = round((left + right) / 2) - 64, round((top + bottom) / 2) - 64
    return canvas.crop((x, y, x + 128, y + 128))


def from_font(path: Path) -> np.ndarray:
    """Renders the chosen captions from the font: uint8 [n, 64, 64, 3]."""
    font = ImageFont.truetype(str(path), STRIKE)
    return np.stack([on_white(glyph(unicodedata.lookup(caption.upper()), font)) for caption in captions()])


def from_archive(directory: Path) -> np.ndarray:
    """Reads the chosen captions from `noto_emoji_72.npz`: uint8 [n, 64, 64, 3]."""
    with np.load(directory / "noto_emoji_72.npz", allow_pickle=False) as archive:
        images, names = archive["images"], [str(name) for name in archive["captions"]]
    index = {name: position for position, name in enumerate(names)}
    missing = [caption for caption in captions() if caption not in index]
    if missing:
        raise ValueError(f"the archive must hold every chosen caption, got none for {missing[:5]}")
    return np.stack([on_white(Image.fromarray(images[index[caption]], "RGBA")) for caption in captions()])


def load(data: Path | None = None, font: Path = FONT) -> np.ndarray:
    """Returns the pictures, uint8 [n, 64, 64, 3], in the order of `captions()`."""
    return from_archive(data) if data is not None else from_font(font)


def add_source(parser: argparse.ArgumentParser) -> None:
    """Adds the two flags that say where pictures come from."""
    parser.add_argument("--data", type=Path, help="folder with noto_emoji_72.npz; default: render the font")
    parser.add_argument("--font", type=Path, default=FONT, help="NotoColorEmoji.ttf with colour bitmaps")


def sheet(images: np.ndarray, columns: int = 20) -> Image.Image:
    """Puts pictures, uint8 [n, h, w, 3], on one sheet, row by row."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    page = np.full((rows, columns, height, width, 3), 255, np.uint8)
    page.reshape(-1, height, width, 3)[:count] = images
    return Image.fromarray(page.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3))


def main() -> None:
    """Writes the picture set, and a contact sheet on request."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_source(parser)
    parser.add_argument("--out", type=Path, help="npz to write: images, captions")
    parser.add_argument("--sheet", type=Path, help="PNG contact sheet to write")
    arguments = parser.parse_args()
    images = load(arguments.data, arguments.font)
    print(f"{len(images)} pictures of {SIZE}x{SIZE}")
    if arguments.out:
        np.savez_compressed(arguments.out, images=images, captions=np.array(captions()))
    if arguments.sheet:
        sheet(images).save(arguments.sheet)


if __name__ == "__main__":
    main()
