"""The package as a user meets it: imported twice, installed from a wheel, beside Hugging Face's `kernels`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OUR_FOLDERS = ("kernels", "runtime", "converters", "bench")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def run(command: list[str], cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    keep = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(command, cwd=cwd, env={**keep, **env}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def python(code: str, cwd: Path, **env: str) -> str:
    """Run `code` with `cwd` on sys.path, as `python -c` does; returns what it printed."""
    return run([sys.executable, "-c", code], cwd, **env).stdout.strip()


def test_import_is_light() -> None:
    code = "import sys, pared; print(sorted({'torch', 'triton', 'transformers', 'numpy', 'typer'} & set(sys.modules)))"
    assert python(code, ROOT / "tests") == "[]"


def test_the_root_imported_under_two_names_has_no_side_effect() -> None:
    code = f"""
import importlib.util, sys
import pared
before = set(sys.modules)
root = {str(ROOT)!r}
spec = importlib.util.spec_from_file_location("clone", root + "/__init__.py", submodule_search_locations=[root])
sys.modules["clone"] = clone = importlib.util.module_from_spec(spec)
spec.loader.exec_module(clone)
assert set(sys.modules) - before == {{"clone"}}, set(sys.modules) - before
assert clone.__version__ == pared.__version__ and clone.__all__ == pared.__all__
from pared import errors
assert errors is pared.errors and issubclass(errors.SourceError, errors.ParedError)
"""
    python(code, ROOT / "tests")


def test_unknown_public_name() -> None:
    import pared

    with pytest.raises(AttributeError, match="no attribute 'Embeder'"):
        _ = pared.Embeder
    assert set(pared.__all__) <= set(dir(pared))


def test_public_names_are_the_real_ones() -> None:
    code = """
import pared, pared.convert
from pared import LLM, SamplingParams, convert
from pared.convert import convert as real
assert convert is real and pared.convert is real and callable(pared.convert), pared.convert
assert LLM.__module__ == "pared.runtime.llm" and SamplingParams.__module__ == "pared.runtime.params"
"""
    python(code, ROOT / "tests")


LOOK = f"""
import importlib.util
for name in {OUR_FOLDERS!r}:
    spec = importlib.util.find_spec(name)
    assert spec is None or spec.origin is None, (name, spec)
"""
MODEL_CLASS = """
import transformers
from transformers import LlamaConfig, LlamaForCausalLM
tiny = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
print(sum(p.numel() for p in LlamaForCausalLM(tiny).parameters()) > 0)
"""


def test_from_the_root_our_folders_are_no_modules_and_transformers_works() -> None:
    code = f"{LOOK}\n{MODEL_CLASS}\nimport sys\nassert not getattr(sys.modules.get('kernels'), '__file__', None)"
    assert python(code, ROOT).endswith("True")


@pytest.fixture(scope="module")
def hf_kernels() -> Path:
    """Hugging Face's own `kernels`, in a folder of its own: in transformers' range if the index has it."""
    home = ROOT / ".data" / "hf-kernels"
    if not (home / "kernels" / "__init__.py").exists():
        from transformers.dependency_versions_table import deps

        for wanted in (deps["kernels"], "kernels"):
            command = [*PIP, "install", "-q", "--no-deps", "--target", str(home), wanted]
            if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                break
        else:
            pytest.skip("pip cannot fetch Hugging Face's kernels here")
    return home


def test_beside_hugging_faces_kernels(hf_kernels: Path) -> None:
    theirs = f"import kernels\nassert kernels.__file__.startswith({str(hf_kernels)!r}), kernels.__file__\n"
    ours = "import pared.kernels.unit, pared.kernels.formats\nassert pared.kernels.unit.Unit\n"
    assert python(theirs + MODEL_CLASS + ours, ROOT, PYTHONPATH=str(hf_kernels)).endswith("True")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree as a clone holds it: building in place would leave a build folder behind."""
    home = tmp_path_factory.mktemp("clone") / "some-clone.1"
    junk = shutil.ignore_patterns(".*", "build", "demo", "dist", "*.egg-info", "__pycache__", "*.so", "results")
    shutil.copytree(ROOT, home, ignore=junk)
    return home


def build_wheel(copy: Path, out: Path, **env: str) -> Path:
    run([*PIP, "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(out), str(copy)], out, **env)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(copy, tmp_path_factory.mktemp("wheel"))


def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_the_wheel_holds_pared_and_nothing_else(wheel: Path) -> None:
    held = names(wheel)
    assert {name.split("/")[0] for name in held} == {"pared", next(n.split("/")[0] for n in held if ".dist-info/" in n)}
    assert not [n for n in held if Path(n).name in ("setup.py", "conftest.py") or n.startswith("pared/tests")]
    modules = [p for p in ROOT.glob("*.py") if p.name != "setup.py"]
    modules += [p for folder in OUR_FOLDERS for p in (ROOT / folder).rglob("*.py") if p.parent.name != "suites"]
    sources = [*modules, *(ROOT / "kernels/native").glob("*.cpp"), *(ROOT / "kernels/native").glob("*.h")]
    sources += [p for part in ("web", "deploy") for p in (ROOT / "runtime/server" / part).iterdir()]
    wanted = {f"pared/{path.relative_to(ROOT).as_posix()}" for path in (*sources, ROOT / "py.typed")}
    assert wanted <= set(held), wanted - set(held)


def test_the_wheel_fits_any_python_on_one_platform(wheel: Path) -> None:
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler on this machine")
def test_the_wheel_brings_its_compiled_kernels(wheel: Path) -> None:
    assert [n for n in names(wheel) if n.startswith("pared/kernels/native/libpared_cpu-") and n.endswith(".so")]


def test_without_a_compiler_the_install_goes_on(copy: Path, tmp_path: Path) -> None:
    shutil.rmtree(copy / "build", ignore_errors=True)
    without = build_wheel(copy, tmp_path, CXX="no-such-compiler")
    assert not [n for n in names(without) if n.endswith(".so")]
    assert "pared/kernels/native/build.py" in names(without)


def test_installed_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "site"
    run([*PIP, "install", "-q", "--no-deps", "--target", str(home), str(wheel)], tmp_path)
    code = f"""
import pared
assert pared.__file__.startswith({str(home)!r}), pared.__file__
from pared.kernels.native import library
library.load()
import pared.cli
"""
    python(code, tmp_path, PYTHONPATH=str(home))


def test_editable_install_and_entry_point(copy: Path, tmp_path: Path) -> None:
    """In an environment of its own that borrows the packages of this one."""
    env = tmp_path / "env"
    venv.create(env, with_pip=False, symlinks=True)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(env), "platbase": str(env)}))
    (own / "borrowed.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    build = ["install", "-q", "--ignore-installed", "--no-build-isolation", "--no-deps", "-e", str(copy)]
    run([*PIP, "--python", str(env / "bin" / "python"), *build], tmp_path)
    where = run([str(env / "bin" / "python"), "-c", "import pared; print(pared.__file__)"], tmp_path).stdout.strip()
    assert where == str(copy / "__init__.py")
    for command in ([str(env / "bin" / "pared")], [str(env / "bin" / "python"), "-m", "pared.cli"]):
        assert "doctor" in run([*command, "--help"], tmp_path).stdout
