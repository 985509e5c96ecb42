"""Who may import whom, read off the code: every import statement, also those inside functions, against one table.

A new arrow fails here, and so does a module that no row of the table names. To add a module, add it to a row; to add an
arrow, change the table, and say in the commit why the house needs it.

Out of reach is what no import statement and no direct call of import_module says: exec, sys.modules, pkgutil, runpy,
another process, and a module that is handed on in a variable.
"""

import ast
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

import pytest
import rungs
import torch
from conftest import NEEDS_TRITON

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = {"dsa_ref": "dsa_ref", "dsa_kernels": "kernels/dsa_kernels", "dsa_bench": "kernels/dsa_bench"}
FOLDERS |= {"dsa_course": "notebooks/dsa_course", "maintain": "notebooks/maintain"}
STEPS = (
    "rope hadamard quantize rotate_quantize index_scores select_topk lightning_select sparse_attention dense_attention "
    "indexer_loss"
).split()
DECODE = "paged_index_scores paged_select paged_sparse_attention".split()  # in dsa_kernels; dsa_ref.decode has all
BACKWARD = "sparse_attention_backward"  # a gradient of a step, in both packages
OWN_FILE = "head_weights mha_attention warm".split()  # in dsa_kernels; in dsa_ref they stand beside other steps


class Row(NamedTuple):
    """`x` is the module x, `x.*` also all below it; `a/step` are those of the steps in package a. A step itself
    may import only earlier ones."""

    modules: str
    ours: str
    others: str


# The standard library may be imported everywhere. "?" is an import by a name that only the running program knows.
TABLE = [
    # the reference: ground floor, steps, judges, then what is built on the steps
    Row("dsa_ref.version dsa_ref.hf_config", "", ""),
    Row("dsa_ref.config", "dsa_ref.hf_config", ""),
    Row("dsa_ref.precision", "", "torch"),
    Row("dsa_ref.products", "dsa_ref.precision", "torch"),
    Row("dsa_ref.arguments", "", "numpy torch"),
    Row("dsa_ref.contracts dsa_ref.blocks", "dsa_ref.config dsa_ref.arguments dsa_ref.contracts", "torch"),
    Row(
        "dsa_ref/step",
        "dsa_ref.config dsa_ref.products dsa_ref.contracts dsa_ref.blocks dsa_ref.sparse_attention_backward "
        "dsa_ref/step",
        "numpy torch",
    ),
    # sparse attention's gradient, which that step hands to autograd where a probe asks for the probabilities
    Row("dsa_ref.sparse_attention_backward", "dsa_ref.products dsa_ref.contracts dsa_ref.blocks", "numpy torch"),
    # serving: layouts, whose pages they are, a layer's pools, and the decode steps on them
    Row("dsa_ref.paged", "dsa_ref.contracts dsa_ref/step", "numpy torch"),
    Row("dsa_ref.append", "dsa_ref.contracts dsa_ref.precision dsa_ref.paged dsa_ref/step", "numpy torch"),
    Row("dsa_ref.page_table", "dsa_ref.contracts", "torch"),
    Row(
        "dsa_ref.paged_cache",
        "dsa_ref.config dsa_ref.precision dsa_ref.contracts dsa_ref.paged dsa_ref.page_table",
        "torch",
    ),
    Row("dsa_ref.decode", "dsa_ref.contracts dsa_ref.blocks dsa_ref/step dsa_ref.paged", "numpy torch"),
    Row(
        "dsa_ref.testing dsa_ref.cost",
        "dsa_ref.config dsa_ref.contracts dsa_ref.blocks dsa_ref/step",
        "numpy torch",
    ),
    Row("dsa_ref.bill", "dsa_ref.config dsa_ref.contracts dsa_ref.cost", ""),
    Row("dsa_ref.group_bill", "dsa_ref.config dsa_ref.contracts dsa_ref.cost dsa_ref.bill", ""),
    Row("dsa_ref.records", "", "torch"),
    Row(
        "dsa_ref",
        "dsa_ref.version dsa_ref.config dsa_ref.contracts dsa_ref/step dsa_ref.sparse_attention_backward "
        "dsa_ref.paged dsa_ref.page_table dsa_ref.paged_cache dsa_ref.append dsa_ref.decode dsa_ref.nn",
        "",
    ),
    Row(
        "dsa_ref.nn.*",
        "dsa_ref dsa_ref.config dsa_ref.hf_config dsa_ref.precision dsa_ref.contracts dsa_ref.blocks dsa_ref/step "
        "dsa_ref.paged dsa_ref.page_table dsa_ref.paged_cache dsa_ref.decode dsa_ref.nn.*",  # the root: default ops
        "torch safetensors ?",  # a copied or unpickled layer imports its ops by name
    ),
    # dsa_ref in other libraries' models: the only importers of those libraries
    Row("dsa_ref.integrations", "", ""),
    Row(
        "dsa_ref.integrations.transformers.*",
        "dsa_ref dsa_ref.config dsa_ref.hf_config dsa_ref.contracts dsa_ref/step dsa_ref.cost dsa_ref.records "
        "dsa_ref.nn.decode dsa_ref.nn.wrapped dsa_ref.nn.checkpoint dsa_ref.nn.block_scales "
        "dsa_ref.long_context.memory "
        "dsa_ref.integrations.transformers.*",
        "torch transformers ?",  # an operator takes no module, but its name
    ),
    Row(  # a layer over a group of ranks
        "dsa_ref.parallel.*",
        "dsa_ref dsa_ref.config dsa_ref.contracts dsa_ref.decode dsa_ref.nn.* dsa_ref.parallel.*",
        "torch ?",  # dsa_kernels, where the command line asks for them
    ),
    Row(
        "dsa_ref.training.*",
        "dsa_ref dsa_ref.config dsa_ref.precision dsa_ref.contracts dsa_ref/step dsa_ref.testing dsa_ref.records "
        "dsa_ref.nn.* dsa_ref.parallel.* dsa_ref.training.*",
        "torch safetensors ?",  # dsa_kernels, where the command line asks for them
    ),
    Row(
        "dsa_ref.long_context.*",
        "dsa_ref dsa_ref.config dsa_ref.contracts dsa_ref/step dsa_ref.page_table dsa_ref.paged_cache dsa_ref.testing "
        "dsa_ref.records dsa_ref.nn.* dsa_ref.training.corpus dsa_ref.long_context.*",
        "torch ?",  # dsa_kernels, where the command line asks for them
    ),
    # the kernels, which share only sizes and argument checks with the reference
    Row("dsa_kernels.cards", "", "torch triton"),
    Row("dsa_kernels.interpreter", "", "numpy torch triton"),  # an interpreted kernel's numbers are NumPy's
    Row(  # it looks for Gluon's parts by their names
        "dsa_kernels.runtime", "dsa_kernels.cards dsa_kernels.interpreter dsa_kernels.hopper.*", "torch ?"
    ),
    Row("dsa_kernels.rounding", "dsa_kernels.runtime", "triton"),
    Row(
        "dsa_kernels.topk.*",
        "dsa_ref.config dsa_ref.contracts dsa_kernels.runtime dsa_kernels.topk.*",
        "torch triton",
    ),
    Row(
        "dsa_kernels.hopper.*",
        "dsa_ref.config dsa_ref.contracts dsa_kernels.cards dsa_kernels.runtime dsa_kernels.key_sums "
        "dsa_kernels.topk.* dsa_kernels.hopper.*",
        "torch triton",
    ),
    Row(
        "dsa_kernels/step",
        "dsa_ref.config dsa_ref.contracts dsa_kernels.cards dsa_kernels.runtime dsa_kernels.rounding "
        "dsa_kernels.topk.* dsa_kernels/step",
        "torch triton",
    ),
    Row(  # the kernels of the indexer's loss
        "dsa_kernels.teach.*",
        "dsa_kernels.cards dsa_kernels.runtime dsa_kernels.rounding dsa_kernels.key_sums dsa_kernels.index_scores "
        "dsa_kernels.teach.*",
        "torch triton",
    ),
    Row(
        "dsa_kernels.indexer_loss",
        "dsa_ref.contracts dsa_kernels.runtime dsa_kernels.key_sums dsa_kernels/step dsa_kernels.teach "
        "dsa_kernels.teach.*",
        "torch",
    ),
    Row(
        "dsa_kernels.sparse_attention_backward",
        "dsa_ref.contracts dsa_kernels.cards dsa_kernels.runtime dsa_kernels.rounding dsa_kernels.key_sums "
        "dsa_kernels/step",
        "torch triton",
    ),
    Row("dsa_kernels.key_sums", "dsa_kernels.runtime dsa_kernels.rounding", "torch triton"),
    Row(
        "dsa_kernels.lightning_select",
        "dsa_ref.contracts dsa_kernels.runtime dsa_kernels.flagged dsa_kernels/step",
        "torch",
    ),
    Row(
        "dsa_kernels.paged_index_scores dsa_kernels.paged_select dsa_kernels.paged_sparse_attention",
        "dsa_ref.config dsa_ref.contracts dsa_kernels.cards dsa_kernels.runtime dsa_kernels.rounding "
        "dsa_kernels.topk.* dsa_kernels/step dsa_kernels.paged_index_scores",
        "torch triton",
    ),
    Row(
        "dsa_kernels.flagged",
        "dsa_ref.contracts dsa_kernels.cards dsa_kernels.runtime dsa_kernels.rounding dsa_kernels.topk.* "
        "dsa_kernels.index_scores",
        "torch triton",
    ),
    Row("dsa_kernels.head_weights", "dsa_ref.contracts dsa_kernels.runtime dsa_kernels/step", "torch triton"),
    Row("dsa_kernels.mha_attention", "dsa_ref.contracts dsa_kernels.runtime", "torch"),
    Row(
        "dsa_kernels.append",
        "dsa_ref.contracts dsa_kernels.runtime dsa_kernels.rounding dsa_kernels/step",
        "torch triton",
    ),
    Row(  # gradients live here alone; the steps call its operators by name
        "dsa_kernels.autograd",
        "dsa_ref.contracts dsa_kernels.runtime dsa_kernels/step dsa_kernels.mha_attention "
        "dsa_kernels.sparse_attention_backward",
        "torch",
    ),
    Row(  # it calls the steps
        "dsa_kernels.warm",
        "dsa_ref.config dsa_ref.contracts dsa_kernels.runtime dsa_kernels/step dsa_kernels.append "
        "dsa_kernels.head_weights dsa_kernels.mha_attention dsa_kernels.paged_select "
        "dsa_kernels.paged_sparse_attention",
        "torch",
    ),
    Row(
        "dsa_kernels",
        "dsa_ref.version dsa_kernels.runtime dsa_kernels/step dsa_kernels.sparse_attention_backward "
        "dsa_kernels.append dsa_kernels.head_weights "
        "dsa_kernels.mha_attention dsa_kernels.paged_index_scores dsa_kernels.paged_select "
        "dsa_kernels.paged_sparse_attention dsa_kernels.warm dsa_kernels.autograd",
        "",
    ),
    # the bench, which knows the reference as a user does
    Row(
        "dsa_bench.*",
        "dsa_ref dsa_ref.nn dsa_ref.training dsa_ref.parallel dsa_ref.testing dsa_ref.cost dsa_ref.records "
        "dsa_ref.integrations.transformers dsa_kernels.* dsa_bench.*",
        "numpy torch triton transformers deep_gemm tilelang",
    ),
    # the course, which nothing but notebooks, tests and maintain imports
    Row("dsa_course.*", "dsa_ref.* dsa_kernels.* dsa_course.*", "numpy torch matplotlib ipywidgets IPython PIL"),
    Row("dsa_course.environment", "dsa_ref.integrations.transformers", "torch"),  # it says what is missing
    Row("dsa_course.your_own_model.convert", "dsa_ref.nn.*", "transformers tokenizers"),
    Row("dsa_course.traps.runs", "dsa_ref.* dsa_course.*", "torch pytest"),  # it runs tests
    Row("dsa_course.export", "", "nbconvert"),  # read by who exports, not by notebooks
    Row("dsa_course.grading", "", "nbgrader"),  # by a teacher alone
    Row("maintain.*", "dsa_ref.* dsa_course.* maintain.*", "nbformat"),
]
PUBLIC = ("dsa_bench",)  # may take from a package of the reference only what its __all__ names
DYNAMIC = {"import_module", "__import__"}  # to be called directly, so that what is imported can be read off
SHADOWED = {f"{package}.{step}" for package in ("dsa_ref", "dsa_kernels") for step in (*STEPS, BACKWARD)}
SHADOWED |= {f"dsa_kernels.{step}" for step in DECODE + OWN_FILE}


def modules():
    """{module name: its path} of the packages in FOLDERS."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def exported(module):
    """The names in the module's __all__, or None where it has none."""
    for node in ast.parse(MODULES[module].read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            return set(ast.literal_eval(node.value))
    return None


def part_of(package, name):
    """(package.name, None) where that is a module, (package, name) for anything else that the package holds."""
    below = f"{package}.{name}"
    return (below, None) if below in MODULES and below not in SHADOWED else (package, name)


def imported(module, source, is_package):
    """(line, module, name or None) for each thing that `source`, the text of `module`, imports.

    A name "*" is a star import; a module "?" is one that only the running program knows.
    """
    package = module if is_package else module.rpartition(".")[0]
    tree = ast.parse(source)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    ours = {}  # what a name of this file stands for, where that is a module of ours
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [(alias.asname or alias.name.partition(".")[0], alias) for alias in node.names]
            ours |= {name: alias.name if alias.asname else name for name, alias in names}
            yield from ((node.lineno, alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = absolute(package, node.level, node.module)
            for alias in node.names:
                target, name = part_of(origin, alias.name)
                if name is None:
                    ours[alias.asname or alias.name] = target
                yield node.lineno, target, name
                if alias.name in DYNAMIC and alias.asname:
                    yield node.lineno, "?", None  # import_module by another name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner:  # the whole of a.b.c
            first, *rest = chain(node)
            target = ours.get(first, "")
            if target.partition(".")[0] in FOLDERS and target not in SHADOWED:
                name = None
                for attribute in rest:
                    target, name = part_of(target, attribute)
                    if name:
                        break
                if name and not name.startswith("__"):  # `import dsa_ref`, then dsa_ref.x
                    yield node.lineno, target, name
                elif not name:
                    yield node.lineno, target, None
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in DYNAMIC:
            yield node.lineno, by_name(node, module, package), None
        elif id(node) not in called and {getattr(node, key, None) for key in ("id", "attr", "value")} & DYNAMIC:
            yield node.lineno, "?", None  # import_module given away, to be called under another name


def absolute(package, level, name):
    """The module that a file in `package` means by `level` dots and `name`."""
    parts = package.split(".")[: len(package.split(".")) - level + 1] if level else []
    return ".".join([*parts, *filter(None, [name])])


def chain(node):
    """The names of a.b.c; the first is "" where a is no name."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id if isinstance(node, ast.Name) else "", *reversed(names)]


def by_name(call, module, package):
    """The module that a call of import_module or __import__ in `module` imports, "?" where it cannot be read off."""
    given = dict(zip(("name", "package"), call.args, strict=False)) | {word.arg: word.value for word in call.keywords}
    argument = given.get("name")
    whole = argument
    if isinstance(argument, ast.JoinedStr):
        argument = argument.values[0]
    if not isinstance(argument, ast.Constant):
        return "?"
    name = str(argument.value).lstrip(".")
    level = len(str(argument.value)) - len(name)
    if argument is not whole:
        name = name.rpartition(".")[0]  # f"a.b.{x}": below a.b
    if level:
        base = given.get("package")
        if isinstance(base, ast.Constant):
            package = str(base.value)
        else:
            package = {"__package__": package, "__name__": module}.get(getattr(base, "id", None))
        if not package:
            return "?"
    return absolute(package, level, name)


def matches(module, patterns, before=None):
    """Whether one of the patterns, as `Row` writes them, names the module. before: a step; only earlier ones match."""
    for pattern in patterns.split():
        package, _, step = pattern.partition("/")
        if step:
            name = module.removeprefix(f"{package}.")
            steps = STEPS[: STEPS.index(before)] if before in STEPS else STEPS
            if module.startswith(f"{package}.") and name in steps:
                return True
        elif module == pattern or pattern.endswith(".*") and f"{module}.".startswith(pattern[:-1]):
            return True
    return False


def rule_for(module):
    """The last row that names the module, None without one."""
    return next((row for row in reversed(TABLE) if matches(module, row.modules)), None)


def broken(module, source, is_package=False):
    """What a module with this text imports against the table, a line each."""
    rule, step = rule_for(module), module.rpartition(".")[2]
    if rule is None:
        return [f"{module} is in no row of the table"]
    found = []
    for line, target, name in imported(module, source, is_package):
        top = target.partition(".")[0]
        if top in FOLDERS:
            fine = matches(target, rule.ours, before=step if matches(module, "dsa_ref/step dsa_kernels/step") else None)
            if fine and module.partition(".")[0] in PUBLIC and top == "dsa_ref" and name:
                names = exported(target)
                fine = names is None or name in names
            private = any(part.startswith("_") and part[:2] != "__" for part in f"{target}.{name or ''}".split("."))
            fine = fine and not (private and top != module.partition(".")[0])
        else:
            fine = top in sys.stdlib_module_names or top in rule.others.split()
        if not fine or name == "*":
            found.append(f"{module}:{line} imports {target}" + (f" ({name})" if name else ""))
    return found


@pytest.mark.parametrize("module", MODULES)
def test_every_import_is_in_the_table(module):
    path = MODULES[module]
    assert broken(module, path.read_text(encoding="utf-8"), path.name == "__init__.py") == []


def homeless(files):
    """Those of the Python files, named from the root, that belong to no package of the table and are no tests."""
    rooms = (
        *(f"{folder}/" for folder in FOLDERS.values()),
        "tests/",
        "notebooks/conftest.py",
        "notebooks/nbgrader_config.py",
    )
    return [name for name in files if not name.startswith(rooms)]


def test_every_python_file_is_in_a_package_of_the_table():
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", "*.py"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):  # a copy without history: what lies in the rooms
        rooms = {ROOT / folder.partition("/")[0] for folder in FOLDERS.values()}
        listed = [path.relative_to(ROOT).as_posix() for room in rooms for path in room.rglob("*.py")]
    assert homeless([name for name in listed if (ROOT / name).is_file()]) == []
    planted = ["kernels/dsa_extra/__init__.py", "kernels/tool.py", "setup.py", "notebooks/old/x.py"]
    assert homeless([*planted, "dsa_ref/rope.py", "tests/rungs.py"]) == planted


def test_the_steps_order_is_the_readmes():
    table = re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert table == STEPS


def test_every_row_names_a_module_and_nothing_is_allowed_in_vain():
    """A row or a permission that nothing uses is an arrow that could come back unseen."""
    used = {}
    for module, path in MODULES.items():
        targets = imported(module, path.read_text(encoding="utf-8"), path.name == "__init__.py")
        used.setdefault(rule_for(module), []).extend(target for _, target, _ in targets)
    assert [row.modules for row in TABLE if row not in used] == []
    idle = {
        (row.modules, package)
        for row, targets in used.items()
        for package in row.others.split()
        if not any(target.partition(".")[0] == package for target in targets)
    }
    assert idle == set()


PLANTED = [
    ("dsa_ref.contracts", "from .blocks import visible"),
    ("dsa_ref.rope", "from .quantize import quantize"),  # a later step
    ("dsa_ref.index_scores", "def f():\n    from dsa_ref.select_topk import select_topk"),
    ("dsa_ref.select_topk", "from .testing import compare_selection"),
    ("dsa_ref.sparse_attention", "from .nn import DSALayer"),
    ("dsa_ref.hadamard", "import dsa_ref"),
    ("dsa_ref.page_table", "from .paged_cache import PagedCache"),
    ("dsa_ref.paged", "from .decode import paged_select"),
    ("dsa_ref.select_topk", "from .paged import unpack_index"),
    ("dsa_ref.cost", "from .nn.layer import LayerCache"),
    ("dsa_ref.testing", "from dsa_ref import cost"),
    ("dsa_ref.nn.layer", "from ..training.corpus import load_corpus"),
    ("dsa_ref.nn.model", "from ..testing import poisoned"),
    ("dsa_ref.nn.checkpoint", "import transformers"),
    ("dsa_ref.training.train", "import dsa_kernels"),
    ("dsa_ref.nn.layer", "from ..parallel import GatheredLayer"),
    ("dsa_ref.parallel.training", "from ..training.stages import STAGES"),
    ("dsa_ref.parallel.gathered", "import dsa_kernels"),
    ("dsa_ref.integrations.transformers.machine", "import dsa_kernels"),
    ("dsa_ref.integrations.transformers.machine", "from triton.experimental import gluon"),
    ("dsa_ref.training.train", "from matplotlib.figure import Figure"),
    ("dsa_ref.records", "import triton"),
    ("dsa_ref.rope", "def f():\n    import importlib\n    importlib.import_module('dsa_kernels.rotate_quantize')"),
    ("dsa_ref.arguments", "from .contracts import check_rope"),
    ("dsa_ref.rope", "from .arguments import check_shapes"),  # contracts hands it on
    ("dsa_kernels.index_scores", "from dsa_ref.arguments import check_shapes"),
    ("dsa_kernels.index_scores", "from dsa_ref.blocks import row_blocks"),
    ("dsa_kernels.index_scores", "from dsa_ref import index_scores"),
    ("dsa_kernels.index_scores", "from .select_topk import launch"),  # a later step
    ("dsa_kernels.index_scores", "import numpy"),
    ("dsa_kernels.sparse_attention", "from dsa_bench import cases"),
    ("dsa_kernels.hopper.select_topk", "from ..select_topk import LOWEST"),
    ("dsa_kernels.hopper.unions", "from ..rounding import round_to"),
    ("dsa_kernels.hopper.unions", "import importlib\nimportlib.import_module('..select_topk', __package__)"),
    ("dsa_kernels.hopper.unions", "import importlib\nimportlib.import_module(f'..{name}.x', __package__)"),
    ("dsa_kernels.hopper.unions", "import importlib\nimportlib.import_module(name)"),  # cannot be read off
    ("dsa_kernels.index_scores", "from .paged_index_scores import paged_index_scores"),
    ("dsa_kernels.paged_index_scores", "from dsa_ref.paged import unpack_index"),
    ("dsa_kernels.hopper.unions", "from ..paged_sparse_attention import merge_parts"),
    ("dsa_kernels.topk.lists", "from ..hopper import unions"),
    ("dsa_bench.cases", "from dsa_ref.contracts import row_ranges"),
    ("dsa_bench.cases", "from dsa_ref import row_ranges"),
    ("dsa_bench.cases", "import dsa_ref\ndsa_ref.contracts.row_ranges(1, 1, 'cpu')"),
    ("dsa_bench.cases", "from dsa_ref.nn.layer import Indexer"),
    ("dsa_bench.cases", "from dsa_ref.nn import Indexer"),
    ("dsa_bench.cases", "from dsa_course import toy"),
    ("dsa_bench.ladder.index_scores", "from dsa_course.checking import Check"),
    ("dsa_course.toy", "from dsa_bench import inputs"),
    ("dsa_course.toy", "import pytest"),
    ("dsa_course.toy", "from maintain import learner"),
    ("dsa_kernels.hopper.unions", "import importlib\nimportlib.import_module('.select_topk', 'dsa_kernels')"),
    ("dsa_kernels.hopper.unions", "import importlib\nimportlib.import_module('.select_topk', package='dsa_kernels')"),
    ("dsa_kernels.hopper.unions", "import importlib\nimportlib.import_module('.select_topk', other)"),
    ("dsa_ref.rope", "import importlib\nimportlib.import_module(name='dsa_kernels')"),
    ("dsa_ref.rope", "import importlib\nimportlib.import_module(*names)"),
    ("dsa_ref.rope", "import importlib\nimportlib.import_module()"),
    ("dsa_ref.rope", "from importlib import import_module as load"),
    ("dsa_ref.rope", "from importlib import import_module\nload = import_module"),
    ("dsa_ref.rope", "import importlib\nload = importlib.import_module"),
    ("dsa_ref.rope", "import importlib\ngetattr(importlib, 'import_module')"),
    ("dsa_ref.rope", "load = __import__"),
    ("dsa_bench.cases", "import dsa_ref as d\nd.contracts.row_ranges(1, 1, 'cpu')"),
    ("dsa_bench.cases", "from dsa_ref import nn\nnn.layer.Indexer"),
    ("dsa_bench.cases", "import dsa_ref\ndsa_ref.nn.layer.Indexer"),
    ("dsa_bench.cases", "import dsa_ref.nn\nf(dsa_ref.nn.layer.Indexer.forward)"),
    ("dsa_bench.cases", "import dsa_ref.nn as n\nn.Indexer"),
    ("dsa_bench.cases", "from dsa_ref.testing import _compare"),
    ("dsa_bench.cases", "from dsa_ref import testing\ntesting._compare()"),
    ("dsa_course.toy", "from dsa_ref import _private"),
    ("dsa_ref.nn.layer", "import dsa_ref as d\nd.testing"),
    ("dsa_course.toy", "from dsa_ref import *"),
    ("dsa_ref.rope", "from math import *"),
    ("dsa_ref.shortcut", ""),  # in no row
    ("dsa_kernels.shortcut", ""),
]


@pytest.mark.parametrize("module, source", PLANTED)
def test_a_planted_arrow_is_found(module, source):
    assert len(broken(module, source)) == 1


def test_allowed_arrows_are_not_found():
    assert broken("dsa_kernels.hopper.unions", "import importlib\nimportlib.import_module('.tma', __package__)") == []
    assert broken("dsa_kernels.index_scores", "import dsa_kernels.runtime as r\nr._aligned, r.__doc__") == []
    assert broken("dsa_bench.cases", "import dsa_ref as d\nd.nn.DSALayer(1).x, d.testing.poisoned, f().testing") == []
    assert broken("dsa_kernels.hopper.unions", "from ..runtime import aligned\nfrom . import select_topk") == []
    assert (
        broken("dsa_bench.cases", "from dsa_ref import V32, cost, index_scores\nfrom dsa_ref.nn import DSALayer") == []
    )
    assert broken("dsa_ref.indexer_loss", "import numpy as np\nfrom .dense_attention import dense_attention") == []
    assert broken("dsa_ref", "from .nn import DSALayer\nfrom .rope import rope", is_package=True) == []


def test_gradients_of_kernels_live_in_one_file():
    for module, path in MODULES.items():
        if module.startswith("dsa_kernels") and module not in ("dsa_kernels.autograd", "dsa_kernels.indexer_loss"):
            assert "autograd.Function" not in path.read_text(encoding="utf-8"), module


# Run in a new process: what importing changes there, and what it loads.
PROBE = """
import importlib, json, logging, os, random, signal, sys, threading, warnings
import numpy, torch

def state():
    return {
        **{f"environment {name}": value for name, value in os.environ.items()},
        "folder": os.getcwd(), "path": list(sys.path), "exception hook": repr(sys.excepthook),
        "warnings": repr(warnings.filters), "signals": repr(signal.getsignal(signal.SIGINT)),
        "log handlers": repr(logging.getLogger().handlers), "threads": threading.active_count(),
        "torch threads": torch.get_num_threads(), "dtype": repr(torch.get_default_dtype()),
        "device": repr(torch.get_default_device()), "gradients": torch.is_grad_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "random": repr(random.getstate()), "numpy's random": repr(numpy.random.get_state()),
        "torch's random": torch.get_rng_state().tolist(),
        "interpreter": "triton" in sys.modules and sys.modules["triton"].knobs.runtime.interpret,
    }

before = state()
for name in sys.argv[1:]:
    importlib.import_module(name)
after = state()
changed = sorted(key for key in {*before, *after} if before.get(key) != after.get(key))
print(json.dumps([changed, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def effects(*names):
    """(what importing these modules changes in a new process, the top-level packages that are loaded then)."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / FOLDERS[package]) + "/.." for package in FOLDERS)
    command = [sys.executable, "-c", PROBE, *names]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tempfile.gettempdir())
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == "" and len(ran.stdout.splitlines()) == 1  # importing says nothing
    changed, loaded = json.loads(ran.stdout)
    return changed, set(loaded)


def test_importing_the_reference_changes_nothing_and_loads_nothing_of_others():
    own = [name for name in MODULES if name.partition(".")[0] == "dsa_ref"]
    names = [name for name in own if not name.startswith("dsa_ref.integrations.")]  # those load the library they serve
    assert 0 < len(own) - len(names) < 12
    changed, loaded = effects(*names)
    assert changed == []
    assert not loaded & {"matplotlib", "ipywidgets", "triton", "transformers", "dsa_kernels", "dsa_course"}


@pytest.mark.skipif(not rungs.has_triton(), reason=NEEDS_TRITON)
def test_importing_the_kernels_switches_the_interpreter_on_and_changes_nothing_else():
    changed, loaded = effects("dsa_kernels")
    assert changed == ([] if torch.cuda.is_available() else ["interpreter"])
    assert not loaded & {"matplotlib", "ipywidgets", "transformers", "dsa_bench", "dsa_course"}


@pytest.mark.parametrize(
    "planted, found",
    [
        ("import os; os.environ['X'] = '1'", "environment X"),
        ("import warnings; warnings.simplefilter('ignore')", "warnings"),
    ],
)
def test_a_planted_side_effect_is_found(planted, found, tmp_path, monkeypatch):
    (tmp_path / "dsa_ref").mkdir()
    (tmp_path / "dsa_ref" / "__init__.py").write_text(planted)
    monkeypatch.setitem(FOLDERS, "dsa_ref", str(tmp_path / "dsa_ref"))
    assert effects("dsa_ref")[0] == [found]
