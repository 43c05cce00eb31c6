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

WITHOUT = "BEIT_FAST_BUILD=0 pip install . installs the backbone without it (no pre-training)"


class CMakeBuild(build_ext):
    """Runs CMake once and puts the module where setuptools (wheel or editable) wants it."""

    def build_extension(self, ext: Extension) -> None:
        # CMake says the same in twenty lines.
        compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
        if not any(shutil.which(compiler) for compiler in compilers):
            missing = " or ".join(compilers)
            raise SystemExit(f"beit_fast: beit_fast._C needs a C++20 compiler, there is no {missing} here; {WITHOUT}.")
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / ext.name
        build.mkdir(parents=True, exist_ok=True)
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        configure = ["cmake", "-S", str(Path(__file__).resolve().parent), "-B", str(build)]
        configure += ["-G", "Ninja"] if shutil.which("ninja") else []
        configure += [f"-D{name}={value}" for name, value in options.items()]
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(build), "--parallel"], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(f"beit_fast: building beit_fast._C failed ({error}); {WITHOUT}.") from None


build_it = os.environ.get("BEIT_FAST_BUILD", "1") != "0"
setup(
    ext_modules=[Extension("beit_fast._C", sources=[])] if build_it else [],
    cmdclass={"build_ext": CMakeBuild},
)
