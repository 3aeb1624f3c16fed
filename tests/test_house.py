"""The house in order: tree, README, imports, packages, style."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def tracked() -> list[str]:
    return subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_the_nine_packages_are_required():
    extras = PROJECT["project"]["optional-dependencies"]
    named = " ".join([*PROJECT["project"]["dependencies"], *(d for e in extras.values() for d in e)])
    for package in ("torch", "transformers", "peft", "accelerate", "deepspeed", "datasets", "bitsandbytes", "gradio", "evaluate"):
        assert re.search(rf"(^| ){package}>=", named), package


def test_torchvision_is_not_here():
    """Merely installed, it breaks transformers' imports or brings gigabytes of CUDA."""
    assert not any((d.metadata["Name"] or "").lower() == "torchvision" for d in distributions())
    assert "torchvision" not in (ROOT / "constraints.txt").read_text()


def test_constraints_hold_versions_only():
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9_.\-]+==[0-9A-Za-z.]+", line), line


def test_importing_is_lazy():
    assert python("import sys, omnimri, omnimri.io; print('torch' in sys.modules)").strip() == "False"
    listed = "print([m for m in ('torch', 'gradio', 'transformers', 'numpy') if m in sys.modules])"
    assert python(f"import sys, omnimri.cli; omnimri.cli.build_parser(); {listed}").strip() == "[]"


def test_nothing_is_pickled_or_fetched_by_the_library():
    for path in [*(ROOT / "omnimri").rglob("*.py"), *(ROOT / "chat_app").rglob("*.py")]:
        text = path.read_text()
        assert not re.search(r"import pickle|torch\.load\((?![^\n]*weights_only=True)|trust_remote_code=True|urllib|requests\.", text), path


def test_the_readmes_tree_is_the_real_one():
    tree = re.search(r"<!-- tree -->\s*```\n(.*?)```", README, re.S).group(1)
    stack: list[str] = []
    told = set()
    for line in tree.splitlines():
        entry = re.match(r"^( *)(\S+)", line)
        if not entry:
            continue
        depth = len(entry[1]) // 4
        stack = [*stack[:depth], entry[2].rstrip("/")]
        told.add("/".join(stack))
    for path in told:
        assert (ROOT / path).exists(), f"{path} is in the README's tree only"
    code = {f for f in tracked() if f.endswith(".py") and not f.startswith("tests/") and not f.endswith("__init__.py")}
    assert code - told == set(), "not in the README's tree"


def test_readme_commands_parse():
    from omnimri.cli import build_parser

    lines = [x for block in re.findall(r"```bash\n(.*?)```", README, re.S) for x in block.splitlines()]
    commands = [x for x in lines if x.startswith("omnimri ")]
    assert len(commands) >= 5
    import shlex

    for line in commands:
        build_parser().parse_args(shlex.split(line, comments=True)[1:])


def test_readme_python_runs(scan_file, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    for block in blocks:
        code = block.replace('"brain.nii.gz"', repr(str(scan_file))).replace("Assistant()", f"Assistant({str(checkpoint)!r})")
        exec(compile(code, "README.md", "exec"), {})


def test_people_are_told_what_this_is():
    for text in (README, (ROOT / "chat_app" / "page.py").read_text(), (ROOT / "omnimri" / "answer.py").read_text()):
        assert "esearch use only" in text or "NOTICE" in text
    assert "independent implementation" in README.lower()
    assert "2508.17524" in README


@pytest.mark.parametrize("command", [["ruff", "check", "."], ["mypy"], ["lint-imports"]])
def test_style_types_and_import_directions(command):
    done = subprocess.run([sys.executable, "-m", *command] if command[0] != "lint-imports" else
                          [str(Path(sys.executable).parent / "lint-imports")], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
