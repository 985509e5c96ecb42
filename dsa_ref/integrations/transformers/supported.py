"""Which transformers this works with. Importing it raises ImportError where transformers is missing or too old."""

import importlib.metadata
import importlib.util
import re

OLDEST = (5, 23)  # the first whose indexer returns a selection and whose caches hold index keys

try:
    version = importlib.metadata.version("transformers")
    if importlib.util.find_spec("transformers") is None:  # what was installed is gone
        version = "none"
except ModuleNotFoundError:  # no package, or an import hook that refuses it
    version = "none"
if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST:
    wanted = ".".join(map(str, OLDEST))
    raise ImportError(
        f"dsa_ref.integrations.transformers needs transformers {wanted} or newer, got {version}: "
        f"pip install 'transformers>={wanted}' with Python 3.11 or newer",
        name="transformers",
    )
