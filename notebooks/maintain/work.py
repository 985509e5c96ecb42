"""Copy the learner edition into work/, where learners write: `python -m notebooks.maintain.work`; `make lab` does.

git ignores work/, so nothing that is written there is in the way of `git pull`. A copy that was not touched follows the
course; one that was is never overwritten.
"""

import hashlib
import json
import shutil

from .learner import LEARNER

WORK = LEARNER.parent / "work"  # as deep as notebooks/, so that links out of it lead where they did
COPIED = ".copied.json"  # {file: SHA-256 of what was copied}, in work/


def copy_course(source=LEARNER, work=WORK) -> list[str]:
    """Bring `work` up to date; the names of files that stay as they are, although the course's have changed."""
    work.mkdir(exist_ok=True)
    record = work / COPIED
    copied = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    kept = []
    for path in sorted((*source.glob("*.ipynb"), *source.glob("*.md"))):
        mine, new = work / path.name, digest(path)
        if not mine.exists() or digest(mine) in (copied.get(path.name), new):
            shutil.copy(path, mine)
            copied[path.name] = new
        elif copied.get(path.name) != new:
            kept.append(path.name)
    record.write_text(json.dumps(copied, indent=1), encoding="utf-8")
    return kept


def digest(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main():
    for name in copy_course():
        print(
            f"work/{name}: the course has a newer one, and yours stays. Rename yours, and this command brings the new."
        )


if __name__ == "__main__":
    main()
