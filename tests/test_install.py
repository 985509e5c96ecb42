"""Our wheel in an environment of its own, beside Hugging Face's `kernels` and transformers, whose names are not ours.

Run by `make test-install`; plain pytest leaves these tests out (marker `install`). It needs the package index, and
fails where that cannot be reached. To be quick, the new environment borrows torch and what else the wheel declares to
need, and nothing more, from the one that runs the tests: by links, so that nothing of this checkout is on its path.
"""

import base64
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

pytestmark = pytest.mark.install

ROOT = pathlib.Path(__file__).parents[1]
OURS = {"dsa_ref": ".", "dsa_kernels": "kernels", "dsa_course": "notebooks"}
# The last transformers whose own extra, and so whose range of versions, asks for a `kernels` that the index has.
TRANSFORMERS = "transformers[kernels]==" + ("5.22.2" if sys.version_info >= (3, 11) else "5.20.2")


def run(*command, cwd):
    """Standard output of a command that must succeed, run without this checkout on the path."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TRITON"))}
    ran = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, f"{' '.join(map(str, command))}\n{ran.stdout[-4000:]}\n{ran.stderr[-4000:]}"
    return ran.stdout


def pip(python, *arguments, cwd):
    """What `pip` prints; the test fails where it does, and says that it needs the package index."""
    try:
        return run(python, "-I", "-m", "pip", "--disable-pip-version-check", *arguments, cwd=cwd)
    except AssertionError as failure:
        pytest.fail(f"pip {' '.join(map(str, arguments))} failed; can the package index be reached?\n{failure}")


class Environment:
    """A virtual environment in `folder`."""

    def __init__(self, folder):
        self.folder = folder
        run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
        self.python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"

    def __call__(self, code):
        """What the code prints, in this environment's Python, isolated (-I)."""
        return run(self.python, "-I", "-c", code, cwd=self.folder)

    def pip(self, *arguments):
        return pip(self.python, *arguments, cwd=self.folder)

    @property
    def site(self):
        return pathlib.Path(self("import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())

    def borrow(self, requirements):
        """Make the requirements and all they need importable by links to what runs the tests."""
        self.pip("uninstall", "--yes", "--quiet", "setuptools")  # older Pythons' venv brings one that torch refuses
        links = self.folder / "borrowed"
        links.mkdir()
        for distribution in closure(requirements):
            for top in {file.parts[0] for file in distribution.files if file.parts[0] not in ("..", "__pycache__")}:
                if not (links / top).exists():
                    (links / top).symlink_to(pathlib.Path(distribution.locate_file(top)).resolve())
        (self.site / "borrowed.pth").write_text(f"{links}\n")

    def files(self, distribution):
        """{path: "sha256=..." of what RECORD says, or ""} of an installed distribution, without compiled files."""
        code = f"""
import importlib.metadata, json
files = importlib.metadata.files({distribution!r})
print(json.dumps({{str(f.locate().resolve()): f"{{f.hash.mode}}={{f.hash.value}}" if f.hash else "" for f in files}}))
"""
        return {path: value for path, value in json.loads(self(code)).items() if not path.endswith(".pyc")}


def closure(requirements):
    """The installed distributions that the requirements need, themselves included."""
    found, waiting = {}, [re.match(r"[\w.-]+", text)[0] for text in requirements]
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # for another platform; pip will say if it is missing
            continue
        waiting += [re.match(r"[\w.-]+", text)[0] for text in found[name].requires or () if "extra ==" not in text]
    return found.values()


def spoilt(files):
    """Those of the files that are gone or are not what RECORD says."""
    found = []
    for path, recorded in files.items():
        if not pathlib.Path(path).is_file():
            found.append(path)
        elif recorded:
            digest = hashlib.sha256(pathlib.Path(path).read_bytes()).digest()
            if recorded != f"sha256={base64.urlsafe_b64encode(digest).decode().rstrip('=')}":
                found.append(path)
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout's files, built from a copy, which leaves nothing here.

    In the copy lies what a build of version 0.1 left there: none of that may get into the wheel.
    """
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    left_out = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info", "build", "*.ipynb")
    shutil.copytree(ROOT, source, ignore=left_out, symlinks=True)
    for left in ("kernels/__init__.py", "dsa_ref/lab/__init__.py", "dsa_kernels/old.py"):
        for base in ("build/lib", "build/bdist.linux-x86_64/wheel"):
            (source / base / left).parent.mkdir(parents=True)
            (source / base / left).touch()
    pip(sys.executable, "wheel", "--no-deps", source, "-w", folder, cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def base(wheel, tmp_path_factory):
    """An environment with the wheel and what it declares to need."""
    environment = Environment(tmp_path_factory.mktemp("base"))
    metadata = importlib.metadata.PathDistribution(
        zipfile.Path(wheel, f"{'-'.join(wheel.stem.split('-')[:2])}.dist-info/")
    )
    environment.borrow([text for text in metadata.requires if "extra ==" not in text])
    environment.pip("install", "--no-index", wheel)
    return environment


def test_the_wheel_holds_our_three_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == set(OURS)
    for package, folder in OURS.items():
        wanted = {path.relative_to(ROOT / folder).as_posix() for path in (ROOT / folder / package).rglob("*.py")}
        assert {name for name in names if name.startswith(f"{package}/") and name.endswith(".py")} == wanted
    data = {"dsa_ref/nn/small_model.safetensors", "dsa_ref/SPEC.md", "dsa_ref/py.typed", "dsa_kernels/py.typed"}
    assert data <= set(names)


def test_the_base_install_has_no_plotting_and_runs_both_rungs(base):
    assert base.pip("check").strip() == "No broken requirements found."
    said = base("""
import importlib.util, json, torch, dsa_ref, dsa_kernels
for name in ("matplotlib", "ipywidgets", "IPython", "transformers", "pytest", "dsa_bench", "kernels"):
    assert importlib.util.find_spec(name) is None, name
assert dsa_ref.__version__ == dsa_kernels.__version__
model = dsa_ref.nn.load_small_model()
q, k, w = torch.randn(40, 4, 32), torch.randn(40, 32), torch.randn(40, 4)
chosen = [package.lightning_select(q, k, w, 8).sort().values for package in (dsa_ref, dsa_kernels)]
assert torch.equal(*chosen)
parameters = sum(p.numel() for p in model.parameters())
print(json.dumps([dsa_ref.__file__, dsa_kernels.__file__, dsa_kernels.mode(), parameters]))
""")
    reference, kernels, mode, parameters = json.loads(said)
    for path in (reference, kernels):
        assert pathlib.Path(path).is_relative_to(base.site), path
    assert mode in ("interpreter", "compiled") and parameters > 2_000_000


def test_an_install_has_no_commit_and_says_where_records_are(base):
    base("""
from dsa_ref import records
found = records.provenance("x", [])
assert found["commit"] is None and found["commit_missing"], found
try:
    records.figures_folder()
except FileNotFoundError as error:
    assert "Change into a checkout" in str(error)
else:
    raise AssertionError
""")


def test_beside_hugging_faces_kernels(base):
    """Both import, transformers takes theirs for what it is, no file is shared, and theirs outlives ours."""
    base.pip("install", TRANSFORMERS)
    ours, theirs = base.files("dsa-reference"), base.files("kernels")
    assert len(theirs) > 10 and not set(ours) & set(theirs)
    assert spoilt(ours) == [] and spoilt(theirs) == []
    imports = """
import importlib.metadata, pathlib, kernels, transformers
from transformers.utils import import_utils
assert kernels.get_kernel, kernels
assert import_utils.is_kernels_available(), importlib.metadata.version("kernels")
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Attention
print(transformers.__version__, "with kernels", importlib.metadata.version("kernels"))
"""
    print(base("import dsa_ref, dsa_kernels, dsa_course\n" + imports))
    base.pip("uninstall", "--yes", "dsa-reference")
    assert [path for path in ours if pathlib.Path(path).exists()] == [] and spoilt(theirs) == []
    base(
        "import importlib.util\nfor name in ('dsa_ref', 'dsa_kernels', 'dsa_course'):\n"
        "    assert importlib.util.find_spec(name) is None, name\n" + imports
    )
