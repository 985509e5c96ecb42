"""Which transformers this works with. Importing it raises ImportError where transformers is missing or too old."""

import importlib.metadata
import re

OLDEST = (5, 23)  # the first whose indexer returns a selection and whose caches hold index keys

try:
    version = importlib.metadata.version("transformers")
except importlib.metadata.PackageNotFoundError:
    version = "none"
if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST:
    wanted = ".".join(map(str, OLDEST))
    raise ImportError(
        f"dsa_ref.integrations.transformers needs transformers {wanted} or newer, got {version}: "
        f"pip install 'transformers>={wanted}'",
        name="transformers",
    )
