"""Packaging: the repository root is the package `pared`; its CPU kernels are compiled on the way."""

from __future__ import annotations

import importlib.util
import re
import sysconfig
from pathlib import Path
from types import ModuleType

from setuptools import setup
from setuptools.command.build_py import build_py

PKG = "pared"
ROOT = Path(__file__).resolve().parent
FOLDERS = (
    "runtime",
    "runtime/server",
    "kernels",
    "kernels/native",
    "converters",
    "converters/sources",
    "converters/methods",
    "bench",
    "bench/gpu",
)
NOT_SHIPPED = {"setup", "conftest"}  # the root is the package, so its own tooling has to be kept out by name


def version() -> str:
    """The version that the root module states: read, not imported, since torch may not be there yet."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise RuntimeError("__init__.py states no __version__")
    return found.group(1)


def parts() -> dict[str, str]:
    """Package name -> folder, for the folders that hold Python files today."""
    held = [folder for folder in FOLDERS if any((ROOT / folder).glob("*.py"))]
    return {PKG: ".", **{f"{PKG}.{folder.replace('/', '.')}": folder for folder in held}}


def native_build() -> ModuleType | None:
    """kernels/native/build.py, loaded by path: the package itself cannot be imported before torch is."""
    path = ROOT / "kernels" / "native" / "build.py"
    spec = importlib.util.spec_from_file_location("pared_native_build", path)
    if not path.exists() or spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildPy(build_py):
    """Copies the package and compiles its CPU kernels into it (beside the sources for an editable install)."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        return [m for m in super().find_package_modules(package, package_dir) if m[1] not in NOT_SHIPPED]

    def run(self) -> None:
        super().run()
        native = native_build()
        if native is None:
            return
        home = ROOT if self.editable_mode else Path(self.build_lib) / PKG
        try:
            built = native.compile_library(home / "kernels" / "native")
        except Exception as error:  # an install never fails for want of a compiler: pared builds later or uses torch
            why = (str(error).splitlines() or [""])[0]
            print(f"pared: CPU kernels were not compiled ({why}); 'pared doctor' tells what runs instead")
        else:
            print(f"pared: compiled {built.name}")


TRAIN = ["peft>=0.17"]
EVAL = ["lm-eval>=0.4.9"]
EMBED = ["pyarrow>=18"]
SENTENCES = "sentence-transformers>=6"
SERVE = ["fastapi>=0.115", "uvicorn>=0.32", "prometheus-client>=0.20"]
GUIDED = ["llguidance>=1.3"]
RAY = [*SERVE, *EMBED, "ray[data,serve]>=2.50"]
OTEL = ["opentelemetry-sdk>=1.30", "opentelemetry-exporter-otlp-proto-http>=1.30"]
TEST = [
    *TRAIN,
    *EVAL,
    *EMBED,
    SENTENCES,
    *SERVE,
    *GUIDED,
    *OTEL,
    *RAY,
    "openai>=1.60",
    "httpx2>=2.12",
    "schemathesis>=4.30; python_version >= '3.11'",
    "pytest>=8.4",
    "pytest-timeout>=2.3",
    "trustme>=1.2",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "ruff>=0.15",
    "mypy>=1.18",
    "setuptools>=77",
    "numpy<2.4",  # the interpreter of triton 3.6 fails with newer ones
    "triton>=3.6; sys_platform == 'linux'",
]
BENCH = ["matplotlib>=3.9", "pytest>=8.4", "pytest-benchmark>=5.1", SENTENCES, *SERVE, "httpx2>=2.12"]

setup(
    name=PKG,
    version=version(),
    description="A runtime for language models that have been pared down",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=list(parts()),
    package_dir=parts(),
    package_data={
        PKG: ["py.typed"],
        f"{PKG}.kernels.native": ["*.cpp", "*.h"],
        f"{PKG}.bench": ["tasks/*.yaml"],
        f"{PKG}.runtime.server": ["web/*", "deploy/*"],
    },
    install_requires=[
        "torch>=2.11,<2.16",
        "transformers>=5.17,<6",
        "numpy>=1.26",
        "safetensors>=0.5",
        "tokenizers>=0.22",
        "gguf>=0.17",
        "jinja2>=3.1",
        "tqdm>=4.66",
        "typer>=0.16",
        "rich>=13.7",
    ],
    extras_require={
        "test": TEST,
        "train": TRAIN,
        "eval": EVAL,
        "embed": EMBED,
        "serve": SERVE,
        "guided": GUIDED,
        "otel": OTEL,
        "ray": RAY,
        "bench": BENCH,
    },
    entry_points={"console_scripts": [f"{PKG}={PKG}.cli:main"]},
    cmdclass={"build_py": BuildPy},
    # The library is loaded through ctypes: any Python 3, one platform.
    options={"bdist_wheel": {"plat_name": re.sub(r"[-. ]", "_", sysconfig.get_platform())}},
)
