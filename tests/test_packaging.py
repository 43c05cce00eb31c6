"""Installation as a user does it: editable, wheel, sdist and without the compiled module, each in a clean environment.

The dependencies are installed once, apart, and lent to every environment through a .pth file: nothing else is in there.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]

WORKS = """
import torch
import beit_fast, beit_fast.kernels
assert beit_fast.kernels.bias_gelu(torch.ones(2, 4), torch.zeros(4)).shape == (2, 4)
model = beit_fast.create_model("beit_tiny_patch16_224", num_classes=3)
assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 3)
"""
SAMPLES = """
from beit_fast.data.sampling import BlockwiseMasking
assert BlockwiseMasking((14, 14), 75).sample(0, 0, [1, 2]).sum() == 150
"""


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)  # type: ignore[call-overload]


def must(*command: str | Path, **options: object) -> str:
    done = run(*command, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the files that git knows or would add: what a user clones."""
    if not (REPOSITORY / ".git").exists():
        pytest.skip("needs a git checkout, to know which files belong to the project")
    listing = must("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=REPOSITORY)
    copy = tmp_path / "source"
    for name in filter(None, listing.split("\0")):
        if (REPOSITORY / name).exists():  # not if it was just deleted
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, copy / name, follow_symlinks=False)
    return copy


@pytest.fixture(scope="module")
def dependencies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dependencies")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    needed = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    constraint = REPOSITORY / "constraints.txt"
    must(sys.executable, "-m", "pip", "install", "--quiet", "--target", folder, "--constraint", constraint, *needed)
    return folder


class Environment:
    def __init__(self, folder: Path, dependencies: Path) -> None:
        venv.create(folder, with_pip=True)
        self.bin = folder / "bin"
        self.folder = folder
        must(
            self.bin / "python", "-m", "pip", "uninstall", "--yes", "--quiet", "setuptools"
        )  # an old one; ours is lent
        packages = must(self.bin / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        Path(packages, "dependencies.pth").write_text(f"{dependencies}\n")
        self.path = os.pathsep.join(map(str, (self.bin, dependencies / "bin", os.environ["PATH"])))

    def pip_install(
        self, *what: str | Path, isolated: bool = False, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Without build isolation, which would fetch CMake anew each time, unless `isolated`."""
        environment = {**os.environ, "PATH": self.path, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **variables}
        options = () if isolated else ("--no-build-isolation",)
        command = (self.bin / "python", "-m", "pip", "install", "--no-deps", *options, *what)
        return run(*command, cwd=self.folder, env=environment)

    def python(self, script: str) -> subprocess.CompletedProcess[str]:
        # from a folder of its own: the clone must not be importable by accident
        environment = {**os.environ, "PYTHONWARNINGS": "error:::beit_fast", "OMP_NUM_THREADS": "2"}
        environment.pop("PYTHONPATH", None)
        return run(self.bin / "python", "-c", script, cwd=self.folder, env=environment)

    def check(self, script: str) -> None:
        done = self.python(script)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def environment(tmp_path: Path, dependencies: Path) -> Environment:
    return Environment(tmp_path / "environment", dependencies)


def build(source: Path, kind: str, into: Path) -> Path:
    """Builds a "wheel" or an "sdist" by setuptools' own hooks; returns the file."""
    into.mkdir()
    hook = f"import setuptools.build_meta as b, sys; b.build_{kind}(sys.argv[1])"
    must(sys.executable, "-c", hook, into, cwd=source)
    (built,) = into.iterdir()
    return built


def expected_modules(source: Path) -> set[str]:
    ours = [path for folder in ("beit_fast", "kernels", "recipes") for path in source.glob(f"{folder}/**/*.py")]
    names = {path.relative_to(source).as_posix() for path in ours}
    return {name if name.startswith("beit_fast/") else f"beit_fast/{name}" for name in names}


@pytest.mark.slow
def test_wheel(source: Path, environment: Environment, tmp_path: Path) -> None:
    wheel = build(source, "wheel", tmp_path / "dist")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert expected_modules(source) <= names
    assert {"beit_fast/py.typed", "beit_fast/_C.pyi", "beit_fast/kernels/static_costs.json"} <= names
    assert any(name.startswith("beit_fast/_C.") and name.endswith(".so") for name in names)
    assert any(name.startswith("beit_fast/tokenizers/weights/") for name in names)
    assert {"beit_fast/recipes/README.md", "beit_fast/recipes/slurm/pretrain.sbatch"} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"beit_fast"}  # no top-level kernels, tests, ...
    installed = environment.pip_install(wheel)
    assert installed.returncode == 0, installed.stderr
    environment.check(WORKS + SAMPLES)


@pytest.mark.slow
def test_an_installed_package_trains_by_name(source: Path, tmp_path: Path) -> None:
    """A wheel outside the checkout: the console script, its version, and three steps of a recipe on built-in images.

    The dependencies are those of this environment; the wheel's files come first.
    """
    wheel = build(source, "wheel", tmp_path / "dist")
    target = tmp_path / "target"
    must(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel)
    environment = {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "2"}

    def beit_fast(*arguments: str) -> str:
        command = (sys.executable, target / "bin" / "beit-fast", *arguments)
        return must(*command, cwd=tmp_path, env=environment)

    where = must(sys.executable, "-c", "import beit_fast; print(beit_fast.__file__)", cwd=tmp_path, env=environment)
    assert where.startswith(str(target))
    assert beit_fast("--version").startswith("beit-fast 0.")
    assert "pretrain_beit_large" in beit_fast("train")
    options = ("--max-steps", "3", "--data.builtin-images", "64", "--evaluation.images", "8", "--device", "cpu")
    output = beit_fast("train", "pretrain_tiny_builtin", *options)
    assert "complete: step 3" in output
    assert (tmp_path / "runs" / "pretrain_tiny_builtin" / "report.html").exists()
    output = beit_fast("train", "pretrain_tiny_builtin", *options, "--gpus", "2", "--output-dir", "runs/two")
    assert "complete: step 3" in output
    assert "2 cpu" in output


@pytest.mark.slow
def test_sdist(source: Path, environment: Environment, tmp_path: Path) -> None:
    sdist = build(source, "sdist", tmp_path / "dist")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert expected_modules(source) <= names
    assert {"setup.py", "CMakeLists.txt", "csrc/bindings.cpp", "csrc/philox.h", "LICENSE"} <= names
    assert not any(name.startswith(("kernels/", "recipes/")) for name in names)  # once, under beit_fast/
    installed = environment.pip_install(sdist, isolated=True)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    environment.check(WORKS + SAMPLES)


@pytest.mark.slow
def test_editable(source: Path, environment: Environment) -> None:
    installed = environment.pip_install("--editable", source)
    assert installed.returncode == 0, installed.stderr
    assert list((source / "beit_fast").glob("_C.*.so"))
    assert (source / "beit_fast" / "kernels").is_symlink()
    environment.check(WORKS + SAMPLES)
    (source / "beit_fast" / "version.py").write_text('__version__ = "edited"\n')
    environment.check("import beit_fast; assert beit_fast.__version__ == 'edited'")


@pytest.mark.slow
def test_without_the_compiled_module(source: Path, environment: Environment) -> None:
    installed = environment.pip_install(source, BEIT_FAST_BUILD="0")
    assert installed.returncode == 0, installed.stderr
    environment.check(WORKS)
    refused = environment.python(SAMPLES)
    assert refused.returncode != 0
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("ModuleNotFoundError")]
    assert "beit_fast._C" in line
    assert "pip install" in line


@pytest.mark.slow
def test_without_a_compiler_one_line_says_so(source: Path, environment: Environment) -> None:
    environment.path = str(environment.bin)
    failed = environment.pip_install(source, CXX="")
    assert failed.returncode != 0
    said = [line for line in (failed.stdout + failed.stderr).splitlines() if "C++20 compiler" in line]
    assert len(said) == 1, failed.stdout + failed.stderr
    assert "BEIT_FAST_BUILD=0" in said[0]
    assert environment.pip_install(source, CXX="", BEIT_FAST_BUILD="0").returncode == 0


@pytest.mark.slow
def test_training_without_the_compiled_module_ends_in_one_line(tmp_path: Path) -> None:
    script = f"""
import runpy, sys
sys.modules["beit_fast._C"] = None  # as BEIT_FAST_BUILD=0 leaves it
sys.argv = ["pretrain_beit_large.py", "--max-steps", "1", "--output-dir", {str(tmp_path / "run")!r}]
runpy.run_path("recipes/pretrain_beit_large.py", run_name="__main__")
"""
    done = run(sys.executable, "-c", script, cwd=REPOSITORY)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error:")]
    assert "beit_fast._C" in line
    assert "pip install" in line


@pytest.mark.parametrize("recipe", ["pretrain_beit_large.py", "pretrain_beit_base.py"])
def test_a_recipe_before_installation_names_the_command(recipe: str) -> None:
    done = run(sys.executable, "-I", "-S", REPOSITORY / "recipes" / recipe)  # -S: no installed packages
    assert done.returncode == 1
    assert (done.stdout + done.stderr).count("\n") == 1
    assert "pip install" in done.stderr


@pytest.mark.parametrize("statement", ["from kernels import bias_gelu", "import kernels; kernels.bias_gelu"])
def test_nothing_can_be_had_from_kernels_as_a_package_of_its_own(statement: str) -> None:
    done = run(sys.executable, "-c", statement, cwd=REPOSITORY)
    assert done.returncode != 0
    assert "import beit_fast.kernels" in done.stderr.strip().splitlines()[-1]


def test_no_op_folder_can_be_had_from_kernels_as_a_package_of_its_own() -> None:
    done = run(sys.executable, "-c", "import kernels.gelu.op", cwd=REPOSITORY)
    assert done.returncode != 0
    assert "ModuleNotFoundError" in done.stderr
