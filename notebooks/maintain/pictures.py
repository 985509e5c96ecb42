"""Copy the README's picture out of the executed course: `python -m notebooks.maintain.pictures`; `make course` does."""

import base64
import pathlib

import nbformat

from .learner import SOURCE

FIGURES = pathlib.Path(__file__).parents[2] / "figures"
PICTURES = {"selection.png": ("00_start_here", "LiveFigure('selection'")}  # file: notebook, its output's text


def picture(notebook, text) -> bytes:
    """The PNG of the output whose text begins so, of a source notebook. Raises: ValueError unless there is just one."""
    outputs = [
        output
        for cell in nbformat.read(SOURCE / f"{notebook}.ipynb", as_version=4).cells
        for output in cell.get("outputs", [])
        if output.get("data", {}).get("text/plain", "").startswith(text)
    ]
    if len(outputs) != 1:
        raise ValueError(f"text must begin one output of {notebook}, got {len(outputs)} for {text!r}")
    return base64.b64decode(outputs[0].data["image/png"])


def main():
    for file, place in PICTURES.items():
        (FIGURES / file).write_bytes(picture(*place))


if __name__ == "__main__":
    main()
