"""Alt text in HTML made of a notebook: nbconvert's own templates drop it.

    jupyter nbconvert --to html --HTMLExporter.preprocessors=dsa_course.export.AltText notebook.ipynb

`make lab` sets this for JupyterLab's "Save and Export Notebook As > HTML", and the site uses it too.
"""

import html

from nbconvert.preprocessors import Preprocessor


class AltText(Preprocessor):
    """Turns each PNG whose output has an alt text into an img element with it, and a live figure into its picture."""

    def preprocess_cell(self, cell, resources, index):
        for output in cell.get("outputs", []):
            about = output.get("metadata", {}).get("image/png", {})
            if "alt" in about and "image/png" in output.data:
                width = f' width="{about["width"]}"' if "width" in about else ""
                source = f"data:image/png;base64,{output.data['image/png'].strip()}"
                picture = f'<img alt="{html.escape(about["alt"])}"{width} style="max-width: 100%" src="{source}">'
                output.data = {"text/html": picture, "text/plain": output.data.get("text/plain", "")}
        return cell, resources
