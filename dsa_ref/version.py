"""The version of this project, which all of its packages share."""

__version__ = "0.2.0"
