"""API.md is what `make api` makes of the source today, and names everything that can be imported."""

import ast

import pytest

import dsa_ref
from notebooks.maintain import api


def test_the_page_is_current():
    """After a change of a signature or of a docstring's first paragraph: `make api`."""
    assert api.PAGE.read_text(encoding="utf-8") == api.page()


def test_the_page_names_every_public_name_once():
    page = api.page()
    reference, kernels = page.split("\n## ")[1:3]
    assert kernels.startswith("`dsa_kernels`")
    for name in dsa_ref.__all__:
        assert reference.count(f"- [`{name}(") + reference.count(f"- [`{name}`]") == 1, name
    assert "select_topk_loops" not in kernels and "- [`sparse_attention(q:" in kernels
    assert "main(" not in page


def test_a_public_name_must_be_defined_and_have_a_docstring(tmp_path, monkeypatch):
    monkeypatch.setattr(api, "ROOT", tmp_path)
    path = tmp_path / "package.py"
    path.write_text('def f(x: int = 1) -> str:\n    """Do it\n    well.\n\n    More."""\ndef g(): pass\nLIMIT = 3\n')
    assert api.entry("f", path) == ["- [`f(x: int=1) -> str`](package.py): Do it well."]
    assert api.entry("LIMIT", path) == ["- [`LIMIT`](package.py) `= 3`"]
    with pytest.raises(ValueError, match="g is public and must have a docstring"):
        api.entry("g", path)
    with pytest.raises(ValueError, match="got 'h'"):
        api.entry("h", path)


def test_a_property_that_can_be_set_stands_there_once(tmp_path, monkeypatch):
    monkeypatch.setattr(api, "ROOT", tmp_path)
    path = tmp_path / "package.py"
    path.write_text(
        'class C:\n    """See."""\n    @property\n    def x(self) -> int:\n        """It."""\n'
        "    @x.setter\n    def x(self, x: int) -> None: pass\n"
    )
    assert api.entry("C", path)[1:] == ["  - `.x`: It."]


def test_the_kernels_public_functions_have_hints():
    path = api.ROOT / api.PACKAGES["dsa_kernels"]
    for name in api.public_names(ast.parse(path.read_text(encoding="utf-8"))):
        function, _ = api.definition(name, path)
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        assert [argument.arg for argument in arguments if not argument.annotation] == [] and function.returns, name
