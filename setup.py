"""Builds the one compiled module, `beit_fast._C`, with CMake; everything else is in pyproject.toml.

`BEIT_FAST_BUILD=0` installs without it: the backbone and its kernels work, training says in one line what is missing.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    """Runs CMake once and puts the module where setuptools (wheel or editable) wants it."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / ext.name
        build.mkdir(parents=True, exist_ok=True)
        import pybind11

        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        configure = [
            "cmake", *generator, "-S", str(Path(__file__).resolve().parent), "-B", str(build),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}", "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(build), "--parallel"], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(
                f"beit_fast: building beit_fast._C failed ({error}). It needs a C++20 compiler; "
                "BEIT_FAST_BUILD=0 pip install . installs the backbone without it."
            ) from None


build_it = os.environ.get("BEIT_FAST_BUILD", "1") != "0"
setup(
    ext_modules=[Extension("beit_fast._C", sources=[])] if build_it else [],
    cmdclass={"build_ext": CMakeBuild},
)
