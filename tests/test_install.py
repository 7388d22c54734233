"""What an installation gives, seen from fresh processes started at the repository root, where traps are deepest."""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def fresh(code: str, *, cwd: Path = ROOT) -> object:
    """Run `code`, which prints one JSON value, in a new interpreter and return the value."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_kernels_is_not_a_package_of_ours():
    """`kernels` is Hugging Face's name; a regular package at the root would take it away from transformers."""
    assert not list((ROOT / "kernels").glob("__init__.*"))
    origin = fresh("""
import importlib.util, json
spec = importlib.util.find_spec("kernels")
print(json.dumps(spec and spec.origin))
""")
    assert origin is None or not Path(origin).is_relative_to(ROOT / "kernels")


def test_a_kernels_package_later_on_the_path_wins(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    origin = fresh(f"""
import importlib.util, json, sys
sys.path = [entry for entry in sys.path if not entry.endswith("site-packages")] + [{str(tmp_path)!r}]
print(json.dumps(importlib.util.find_spec("kernels").origin))
""")
    assert Path(origin) == tmp_path / "kernels" / "__init__.py"


def test_transformers_does_not_take_our_folder_for_kernels():
    installed, available = fresh("""
import importlib.metadata, json
from transformers.utils import is_kernels_available
installed = "kernels" in importlib.metadata.packages_distributions()
print(json.dumps([installed, is_kernels_available()]))
""")
    assert installed or not available


@pytest.mark.parametrize("cwd", ["root", "elsewhere"])
def test_kernels_resolve_from_their_folder(cwd, tmp_path):
    file = fresh(
        """
import json
import sami_fast.kernels.segment_infonce_reference
print(json.dumps(sami_fast.kernels.segment_infonce_reference.__file__))
""",
        cwd=ROOT if cwd == "root" else tmp_path,
    )
    assert Path(file).resolve() == ROOT / "kernels" / "segment_infonce_reference.py"


def test_import_is_light():
    modules = fresh("""
import json, sys
import sami_fast
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
""")
    assert "sami_fast" in modules
    heavy = {"triton", "transformers", "accelerate", "datasets", "peft", "matplotlib", "pandas", "rich"}
    assert not heavy & set(modules)


def test_works_without_triton():
    """As on a machine where Triton has no build: the import fails, the op runs."""
    assert fresh("""
import json, sys
sys.modules["triton"] = None
import torch
import sami_fast
from sami_fast import Group
group = Group(prompts=[[1, 2], [1, 3]], responses=[[4, 5], [6]])
packed = sami_fast.pack([group])
tokens = torch.tensor([-1.0, -1.0, -3.0, -3.0, -3.0, -1.0])
loss, matrix, _ = sami_fast.segment_infonce(tokens, packed.offsets, packed.shapes, packed.positives)
expected = torch.nn.functional.cross_entropy(matrix.view(2, 2), torch.arange(2))
print(json.dumps(bool(torch.allclose(loss, expected)) and "triton" not in [m for m in sys.modules if sys.modules[m]]))
""")


def build(tmp_path_factory, cuda: str) -> Path:
    """The wheel that SAMI_FAST_CUDA makes."""
    if shutil.which("cmake") is None or importlib.util.find_spec("scikit_build_core") is None:
        pytest.skip("building a wheel without build isolation needs cmake and scikit-build-core")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    # A build folder of its own: the tree's holds the cache of the installation that is being tested.
    command += ["--config-settings", f"build-dir={folder / 'build'}", "--wheel-dir", str(folder), str(ROOT)]
    environment = {**os.environ, "SAMI_FAST_CUDA": cuda}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    with zipfile.ZipFile(build(tmp_path_factory, "OFF")) as archive:
        yield archive


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = wheel.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"sami_fast"}
    assert not [name for name in names if name.endswith((".so", ".pyc"))]
    for folder, target in (("sami_fast", "sami_fast"), ("kernels", "sami_fast/kernels")):
        files = [path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*") if path.is_file()]
        sources = {f"{target}/{path.as_posix()}" for path in files if "__pycache__" not in path.parts}
        assert sources and sources <= set(names), sorted(sources - set(names))
    assert "sami_fast/kernels/segment_infonce_reference.py" in names
    assert [name for name in names if name.startswith("sami_fast/templates/") and name.endswith(".txt")]
    assert [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]


def test_wheel_declares_the_command_and_no_pinned_torch(wheel):
    (entry_points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "sami-fast=sami_fast.cli:main" in wheel.read(entry_points).decode().replace(" ", "")
    (metadata,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    required = [line for line in wheel.read(metadata).decode().splitlines() if line.startswith("Requires-Dist:")]
    assert "Requires-Dist: torch>=2.11" in required


def fresh_from(folder: Path, code: str) -> object:
    """`fresh` where sami_fast is an unpacked wheel and the source tree is out of sight."""
    hide = f"""
import json, sys
sys.meta_path = [finder for finder in sys.meta_path if "skbc" not in type(finder).__module__]
sys.path = [{str(folder)!r}] + [entry for entry in sys.path if entry != {str(ROOT)!r}]
"""
    return fresh(hide + code, cwd=folder)


def test_installed_wheel_works_outside_the_tree(wheel, tmp_path):
    wheel.extractall(tmp_path)
    files = fresh_from(
        tmp_path,
        """
import sami_fast, sami_fast.kernels.segment_infonce_reference as reference
print(json.dumps([sami_fast.__file__, reference.__file__, sami_fast.backends()["cuda"]]))
""",
    )
    assert all(Path(file).is_relative_to(tmp_path) for file in files[:2])
    assert files[2].startswith("unavailable: sami_fast._C was not built")


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_without_nvcc_the_loss_runs_on_the_host_code(tmp_path_factory, tmp_path):
    with zipfile.ZipFile(build(tmp_path_factory, "HOST")) as archive:
        assert len([name for name in archive.namelist() if name.endswith(".so")]) == 1
        archive.extractall(tmp_path)
    available, version, log, loss, refused = fresh_from(
        tmp_path,
        """
import logging, io
import torch, sami_fast, sami_fast._C
stream = io.StringIO()
logging.basicConfig(stream=stream, level=logging.INFO)
tokens, offsets, positives = torch.tensor([-1.0, -3.0, -3.0, -1.0]), torch.arange(5), torch.arange(2)
loss = sami_fast.segment_infonce(tokens, offsets, [(2, 2)], positives)[0].item()
try:
    sami_fast.segment_infonce(tokens.to("meta"), offsets.to("meta"), [(2, 2)], positives.to("meta"), backend="cuda")
except ValueError as error:
    refused = str(error)
print(json.dumps([sami_fast.backends()["cuda"], sami_fast._C.cuda_version(), stream.getvalue(), loss, refused]))
""",
    )
    assert available.startswith("unavailable: sami_fast._C holds its host code alone (no nvcc") and version is None
    assert "segment_infonce runs on backend 'cuda' (cpu tensors)" in log
    assert loss == pytest.approx(math.log1p(math.exp(-2)), rel=1e-6)
    assert refused == "backend: expected sami_fast._C to be built for meta for backend 'cuda', got a build for cpu"
