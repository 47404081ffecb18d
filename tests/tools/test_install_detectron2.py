"""The installer of Detectron2, on a small wheel made here; nothing is downloaded."""

import base64
import csv
import hashlib
import importlib.util
import io
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "install_detectron2.py"
INFO = "detectron2-0.6.dist-info"

SOURCE_FILES = {
    "LabGym/__init__.py": "raise RuntimeError('not to be used')\n",
    "LabGym/detectors.py": "from LabGym.detectron2 import layers\n",
    "LabGym/detectron2/__init__.py": '__version__ = "0.6"\n',
    "LabGym/detectron2/utils/__init__.py": "",
    "LabGym/detectron2/utils/comm.py": "def get_rank():\n    return 0\n",
    "LabGym/detectron2/engine/__init__.py": (
        "import LabGym.detectron2  # noqa\n"
        "import LabGym.detectron2.utils.comm as comm\n"
        "from LabGym.detectron2 import utils\n"
        "from LabGym.detectron2.utils.comm import get_rank\n"
        'NAME = "LabGym.detectron2"\n'
        'TARGET = "LabGym.detectron2.utils.comm.get_rank"\n'
        "VERSION = LabGym.detectron2.__version__\n"
    ),
    "LabGym/detectron2/model_zoo/configs/Base.yaml": "MODEL:\n  WEIGHTS: 'x'\n",
    "labgym-3.1.2.dist-info/METADATA": "Name: LabGym\n",
}


def load_script():
    spec = importlib.util.spec_from_file_location("install_detectron2", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script():
    return load_script()


@pytest.fixture
def make_source(tmp_path):
    """A function that writes a source wheel and returns its path and digest."""

    def make(**changes):
        files = dict(SOURCE_FILES)
        files.update({f"LabGym/detectron2/{name}": text for name, text in changes.items()})
        path = tmp_path / "source.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in files.items():
                archive.writestr(name, text)
        return path, hashlib.sha256(path.read_bytes()).hexdigest()

    return make


@pytest.fixture
def wheel(script, make_source, tmp_path):
    return script.make_wheel(tmp_path / "wheels", *make_source())


def test_wheel_has_only_the_folder_with_the_prefix_restored(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        engine = archive.read("detectron2/engine/__init__.py").decode()
        yaml = archive.read("detectron2/model_zoo/configs/Base.yaml").decode()
    expected = {
        name[len("LabGym/") :] for name in SOURCE_FILES if name.startswith("LabGym/detectron2/")
    }
    assert {name for name in names if not name.startswith(INFO)} == expected
    assert engine == SOURCE_FILES["LabGym/detectron2/engine/__init__.py"].replace("LabGym.", "")
    assert yaml == SOURCE_FILES["LabGym/detectron2/model_zoo/configs/Base.yaml"]


def test_wheel_record_metadata_licence_and_provenance(script, wheel, make_source):
    with zipfile.ZipFile(wheel) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    rows = list(csv.reader(io.StringIO(entries[f"{INFO}/RECORD"].decode())))
    assert {row[0] for row in rows} == set(entries)
    for name, digest, size in rows:
        if name == f"{INFO}/RECORD":
            assert (digest, size) == ("", "")
            continue
        expected = base64.urlsafe_b64encode(hashlib.sha256(entries[name]).digest())
        assert digest == "sha256=" + expected.decode().rstrip("=")
        assert int(size) == len(entries[name])

    metadata = Parser().parsestr(entries[f"{INFO}/METADATA"].decode())
    assert (metadata["Name"], metadata["Version"]) == ("detectron2", "0.6")
    assert metadata["License"] == "Apache-2.0"
    requirements = metadata.get_all("Requires-Dist")
    assert {"setuptools<81", "yacs>=0.1.8", "tabulate"} <= set(requirements)
    assert not any(requirement.startswith(("black", "torch")) for requirement in requirements)

    assert b"Apache License" in entries[f"{INFO}/licenses/LICENSE"]
    provenance = entries[f"{INFO}/PROVENANCE.txt"].decode()
    assert make_source()[1] in provenance and "LabGym 3.1.2" in provenance


def test_wheel_bytes_are_reproducible(script, make_source, tmp_path):
    source, digest = make_source()
    first = script.make_wheel(tmp_path / "a", source, digest).read_bytes()
    assert script.make_wheel(tmp_path / "b", source, digest).read_bytes() == first


def test_installs_imports_and_uninstalls(script, wheel, tmp_path, monkeypatch):
    # a Detectron2 on the path of the tests is not in the new environment
    monkeypatch.delenv("PYTHONPATH", raising=False)
    folder = tmp_path / "env"
    venv.create(folder, with_pip=False)
    python = str(folder / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]

    assert script.inspect_environment(python) == (False, None, None, None)
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    state = script.inspect_environment(python)
    assert (state.version, state.error) == ("0.6", None)
    assert Path(state.location).is_relative_to(folder)
    code = (
        "import importlib.metadata, detectron2.engine as e; "
        "print(importlib.metadata.version('detectron2'), e.VERSION, e.NAME, e.comm.get_rank())"
    )
    output = subprocess.run([python, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    assert output.stdout.split() == ["0.6", "0.6", "detectron2", "0"]
    subprocess.run([*pip, "uninstall", "-q", "-y", "detectron2"], check=True)
    assert not list(folder.rglob("detectron2*"))


def test_damaged_source_is_refused_and_nothing_written(script, make_source, tmp_path, capsys):
    source, digest = make_source()
    with pytest.raises(script.InstallError, match=f"source.whl has SHA-256 {digest}, expected a29"):
        script.make_wheel(tmp_path / "wheels", source)
    assert not (tmp_path / "wheels").exists()

    arguments = ["--wheel", str(source), "--wheel-dir", str(tmp_path / "wheels")]
    assert script.main(arguments) == 1
    assert "error: source.whl has SHA-256" in capsys.readouterr().err
    assert not (tmp_path / "wheels").exists()


def test_missing_source_is_one_sentence(script, tmp_path):
    with pytest.raises(script.InstallError, match="none.whl cannot be read"):
        script.make_wheel(tmp_path, tmp_path / "none.whl")


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.py", "import LabGym\n", "a.py mentions LabGym in a form"),
        ("a.py", "x = 'labgym_models'\n", "a.py mentions LabGym in a form"),
        ("a.py", "import LabGym.detectron2x\n", "a.py mentions LabGym in a form"),
        ("a.yaml", "_target_: LabGym.detectron2.x\n", "a.yaml mentions LabGym in a form"),
        ("a.py", "def f(:\n", "a.py is not valid Python"),
        ("__init__.py", '__version__ = "0.7"\n', "holds Detectron2 0.7, expected 0.6"),
        ("__init__.py", "", "holds Detectron2 none, expected 0.6"),
    ],
)
def test_unexpected_contents_are_refused(script, make_source, tmp_path, name, text, message):
    source, digest = make_source(**{name: text})
    with pytest.raises(script.InstallError, match=message):
        script.make_wheel(tmp_path / "wheels", source, digest)


def test_stops_where_detectron2_is_installed(script, capsys, monkeypatch):
    monkeypatch.setattr(script, "make_wheel", lambda *args: pytest.fail("must not be reached"))
    assert script.main([]) == 0
    import detectron2

    output = capsys.readouterr().out
    assert f"Detectron2 {detectron2.__version__} is installed already" in output
    assert str(Path(detectron2.__file__).parent) in output


@pytest.mark.parametrize(
    "state, message",
    [
        ((False, None, None, None), "PyTorch is not installed"),
        ((True, None, "there", "ImportError: x"), r"detectron2 in there.*\(ImportError: x\)"),
    ],
)
def test_unusable_environments_are_refused(script, monkeypatch, state, message):
    monkeypatch.setattr(script, "inspect_environment", lambda: script.Environment(*state))
    with pytest.raises(script.InstallError, match=message):
        script.install(None, None)


def test_broken_detectron2_is_found_out(script, tmp_path, monkeypatch):
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2" / "__init__.py").write_text("raise OSError('no operators')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    state = script.inspect_environment()
    assert state.version is None and state.error == "OSError: no operators"
    assert state.location == str(tmp_path / "detectron2" / "__init__.py")


def test_missing_constraints_file(script, tmp_path, monkeypatch):
    state = script.Environment(True, None, None, None)
    monkeypatch.setattr(script, "inspect_environment", lambda: state)
    with pytest.raises(script.InstallError, match="none.txt does not exist"):
        script.install(None, tmp_path / "none.txt")


def test_failed_download_points_to_the_wheel_option(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        subprocess, "run", lambda *args, **kwargs: subprocess.CompletedProcess(args, 1, "no route")
    )
    with pytest.raises(script.InstallError, match="could not download LabGym==3.1.2.*--wheel FILE"):
        script.download_source(tmp_path)
    assert "no route" in capsys.readouterr().err


@pytest.mark.network
def test_published_wheel(script, tmp_path):
    path = script.make_wheel(tmp_path)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    assert "detectron2/modeling/meta_arch/retinanet.py" in names
    assert "detectron2/model_zoo/configs/COCO-Detection/retinanet_R_50_FPN_1x.yaml" in names
