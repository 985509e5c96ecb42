"""The course's live figures, one module for each notebook's topic. Each builder returns a `viz.LiveFigure`."""
