"""What only the course needs: the exercises' checks, live figures, pictures, the toy and the trap museum.

One folder a topic: `check` judges its exercises, `live` draws its figures. Import the module you need: only `viz` and
the `live` modules load matplotlib and ipywidgets.
"""
