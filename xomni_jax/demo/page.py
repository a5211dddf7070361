"""The demo's page: one HTML file that needs nothing else."""

import base64
import html
import io
from collections.abc import Sequence

from PIL import Image

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; padding: 0 1rem;
       max-width: 64rem; color: #222; background: #fff; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; }
.grid { display: grid; gap: 1rem 1.2rem;
        grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); }
.wide { grid-template-columns: 1fr; }
figure { margin: 0; } .row { display: flex; gap: .3rem; }
img { width: 100%; min-width: 0; image-rendering: pixelated; }
figcaption { font-size: .85rem; color: #555; overflow-wrap: anywhere; }
.good { color: #0a6b2d; } .bad { color: #b00020; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: .3rem 1.2rem .3rem 0;
         border-bottom: 1px solid #ddd; vertical-align: top; }
td.number, th.number { text-align: right; }
"""


def page(title: str, parts: Sequence[str]) -> str:
  """A whole HTML document."""
  return (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width">'
    f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
    f"<h1>{html.escape(title)}</h1>{''.join(parts)}</body></html>\n"
  )


def section(title: str, text: str, *parts: str) -> str:
  """A heading, a paragraph and what belongs to them."""
  body = "".join(parts)
  return f"<h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>{body}"


def grid(figures: Sequence[str], wide: bool = False) -> str:
  """Figures side by side; wide: each takes the whole width."""
  return f'<div class="grid{" wide" if wide else ""}">{"".join(figures)}</div>'


def figure(images: Sequence[Image.Image], *lines: str) -> str:
  """Images in a row, and lines of HTML under them."""
  shown = "".join(map(_image, images))
  return (
    f'<figure><div class="row">{shown}</div>'
    f"<figcaption>{'<br>'.join(lines)}</figcaption></figure>"
  )


def text(value: str, good: bool | None = None) -> str:
  """A piece of text as HTML, in green or red where it is right or wrong."""
  escaped = html.escape(value)
  if good is None:
    return escaped
  return f'<span class="{"good" if good else "bad"}">{escaped}</span>'


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
  """A table whose columns but the first are right-aligned."""

  def cells(tag, row):
    return "".join(
      f"<{tag}{' class=number' if i else ''}>{html.escape(str(x))}</{tag}>"
      for i, x in enumerate(row)
    )

  body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
  return f"<table><tr>{cells('th', head)}</tr>{body}</table>"


def _image(image):
  data = io.BytesIO()
  image.save(data, "PNG")
  url = base64.b64encode(data.getvalue()).decode()
  return f'<img alt="" src="data:image/png;base64,{url}">'
