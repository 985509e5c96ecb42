"""What .ci/run runs, with every program that it calls replaced: it must not stay green by leaving something out."""

import os
import pathlib
import shutil
import subprocess

import pytest

RUN = pathlib.Path(__file__).parents[1] / ".ci" / "run"
TARGETS = ["lint", "test", "test-grading", "test-install"]
BROWSER = ["test-browser", "test-site"]

pytestmark = pytest.mark.skipif(os.name == "nt", reason="CI's script needs bash")


@pytest.fixture
def ci(tmp_path):
    """A function that runs .ci/run with programs as given, {name: script}: (exit code, make's targets, output)."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (tmp_path / ".ci").mkdir()
    shutil.copy(RUN, tmp_path / ".ci" / "run")
    for name in ("bash", "dirname", "env", "true"):
        (programs / name).symlink_to(shutil.which(name))

    def run(environment=(), **scripts):
        scripts = {"make": "echo target $1", "uname": "echo Linux", "id": "echo 0", "npm": "true"} | scripts
        for name, script in scripts.items():
            path = programs / name.replace("_", "-")
            path.write_text(f"#!{shutil.which('bash')}\n{script}\n")
            path.chmod(0o755)
        command = [shutil.which("bash"), str(tmp_path / ".ci" / "run")]
        ran = subprocess.run(command, env={"PATH": str(programs), **dict(environment)}, capture_output=True, text=True)
        said = ran.stdout + ran.stderr
        targets = [line.removeprefix("target ") for line in said.splitlines() if line.startswith("target ")]
        return ran.returncode, targets, said

    return run


@pytest.mark.parametrize("name", ["chromium", "chromium_browser", "google_chrome"])
def test_where_chromium_is_the_browser_test_runs(ci, name):
    assert ci(**{name: "true"})[:2] == (0, [*TARGETS, *BROWSER])


@pytest.mark.parametrize(
    "user", [{}, {"id": "echo 1000", "sudo": '[ "$1" = -n ] && shift && "$@"'}], ids=["root", "sudo"]
)
def test_where_chromium_can_be_installed_it_is(ci, user):
    installs = f'[ "$1" = update ] || {shutil.which("cp")} "$0" "${{0%/*}}/chromium"'
    assert ci(**user, apt_get=installs)[:2] == (0, [*TARGETS, *BROWSER])


@pytest.mark.parametrize("apt_get", ["exit 100", '[ "$1" = update ]', "true"])
def test_where_installing_it_fails_ci_fails(ci, apt_get):
    code, targets, _ = ci(apt_get=apt_get)
    assert code != 0 and targets == TARGETS


def test_without_npm_s_registry_the_site_is_left_out_and_ci_says_so(ci):
    code, targets, said = ci(chromium="true", npm="exit 1")
    assert (code, targets) == (0, [*TARGETS, "test-browser"]) and "The site's test was left out" in said


NOT_ROOT = {"id": "echo 1000", "apt_get": "true"}
NO_BROWSER = [NOT_ROOT, NOT_ROOT | {"sudo": "exit 1"}, {"uname": "echo Darwin"}, {}]


@pytest.mark.parametrize("machine", NO_BROWSER)
def test_where_it_cannot_be_installed_it_is_left_out_on_a_desk(ci, machine):
    code, targets, said = ci(**machine)
    assert code == 0 and targets == TARGETS and "The browser test was left out" in said


@pytest.mark.parametrize("machine", NO_BROWSER)
def test_where_it_cannot_be_installed_a_ci_service_fails(ci, machine):
    code, targets, said = ci({"CI": "true"}, **machine)
    assert code != 0 and targets == TARGETS and "The browser test cannot run" in said


@pytest.mark.parametrize("target", [*TARGETS, *BROWSER])
def test_a_target_that_fails_fails_ci(ci, target):
    code, targets, _ = ci(make=f'echo target $1; [ "$1" != {target} ]', chromium="true")
    assert code != 0 and targets[-1] == target
