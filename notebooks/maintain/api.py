"""Make API.md, every public name with its signature and its docstring's first line: `python -m notebooks.maintain.api`.

Read off the source without importing it, so that the page is the same on every platform. `make api` does this.
"""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "API.md"
PACKAGES = {  # in the page's order: what the heading says, and the file
    "dsa_ref": "dsa_ref/__init__.py",
    "dsa_kernels": "kernels/dsa_kernels/__init__.py",
    "dsa_ref.nn": "dsa_ref/nn/__init__.py",
    "dsa_ref.nn.generate": "dsa_ref/nn/generate.py",
    "dsa_ref.long_context": "dsa_ref/long_context/__init__.py",
    "dsa_ref.parallel": "dsa_ref/parallel/__init__.py",
    "dsa_ref.training.corpus": "dsa_ref/training/corpus.py",
    "dsa_ref.training.needle": "dsa_ref/training/needle.py",
    "dsa_ref.training.data": "dsa_ref/training/data.py",
    "dsa_ref.training.stages": "dsa_ref/training/stages.py",
    "dsa_ref.training.optimizer": "dsa_ref/training/optimizer.py",
    "dsa_ref.training.loop": "dsa_ref/training/loop.py",
    "dsa_ref.training.run": "dsa_ref/training/run.py",
    "dsa_ref.training.state": "dsa_ref/training/state.py",
    "dsa_ref.training.train": "dsa_ref/training/train.py",
    "dsa_ref.training.evaluate": "dsa_ref/training/evaluate.py",
    "dsa_ref.training.regimes": "dsa_ref/training/regimes.py",
    "dsa_ref.training.measures": "dsa_ref/training/measures.py",
    "dsa_ref.training.results": "dsa_ref/training/results.py",
    "dsa_ref.cost": "dsa_ref/cost.py",
    "dsa_ref.bill": "dsa_ref/bill.py",
    "dsa_ref.testing": "dsa_ref/testing.py",
    "dsa_ref.records": "dsa_ref/records.py",
}
HEAD = """\
# API

Every public name, with its signature and what it does in a line; its docstring has shapes, dtypes, units, errors and
sources. Made from the source by `make api`, never edited. T, S, H and the other symbols are those of
[`dsa_ref/SPEC.md`](dsa_ref/SPEC.md). [`PEERS.md`](PEERS.md) says what differs from other libraries.
"""


def page() -> str:
    """The text of API.md."""
    parts = [HEAD]
    for name, file in PACKAGES.items():
        path = ROOT / file
        tree = ast.parse(path.read_text(encoding="utf-8"))
        parts += [f"\n## `{name}`\n", f"\n{summary(tree)}\n\n"]
        parts += [line + "\n" for public in public_names(tree) for line in entry(public, path)]
    return "".join(parts)


def public_names(tree):
    """The names in `__all__`, else those of all functions and classes without a leading underscore, less `main`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    defined = (node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef))
    return [name for name in defined if not name.startswith("_") and name != "main"]


def entry(name, path):
    """The lines of one name that the module at `path` defines or passes on."""
    node, path = definition(name, path)
    where = path.relative_to(ROOT).as_posix()
    if isinstance(node, ast.FunctionDef):
        return [f"- [`{name}{signature(node)}`]({where}): {summary(node)}"]
    if isinstance(node, ast.ClassDef):
        methods = {}
        for part in node.body:
            if isinstance(part, ast.FunctionDef):
                methods.setdefault(part.name, part)  # the first of a name: not a property's setter
        init = signature(methods["__init__"], method=True) if "__init__" in methods else fields(node)
        lines = [f"- [`{name}{init}`]({where}): {summary(node)}"]
        for public, method in methods.items():
            if not public.startswith("_"):
                lines.append(
                    f"  - `.{public}{'' if is_property(method) else signature(method, method=True)}`: {summary(method)}"
                )
        return lines
    return [f"- [`{name}`]({where}) `= {ast.unparse(node.value)}`"]


def definition(name, path):
    """(the node that defines the name, the file it stands in), following imports. Raises: ValueError for neither."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node, path
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return node, path
        if isinstance(node, ast.ImportFrom) and node.level == 1 and name in (alias.name for alias in node.names):
            module = path.parent.joinpath(*node.module.split("."))
            return definition(name, module / "__init__.py" if module.is_dir() else module.with_suffix(".py"))
    raise ValueError(f"name must be defined or imported in {path}, got {name!r}")


def signature(node, method=False) -> str:
    """The arguments as the source has them, a method's without self, and what it returns."""
    arguments = ast.unparse(node.args)
    if method:
        arguments = arguments.partition(", ")[2]  # without self
    if node.name == "__init__":
        return f"({arguments})"
    return f"({arguments})" + (f" -> {ast.unparse(node.returns)}" if node.returns else "")


def is_property(node) -> bool:
    """Whether a method is read like an attribute."""
    return any(ast.unparse(decorator).endswith("property") for decorator in node.decorator_list)


def fields(node) -> str:
    """The arguments of a dataclass."""
    return "(" + ", ".join(ast.unparse(part) for part in node.body if isinstance(part, ast.AnnAssign)) + ")"


def summary(node) -> str:
    """The first paragraph of the docstring, on one line. Raises: ValueError without one."""
    text = ast.get_docstring(node)
    if not text:
        raise ValueError(f"{getattr(node, 'name', 'module')} is public and must have a docstring")
    return " ".join(text.split("\n\n")[0].split())


def main():
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
