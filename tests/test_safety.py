"""No code of ours runs code it reads: pickles, eval, unsafe YAML, shells, whole-object torch.load."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

FORBIDDEN_CALLS = {
    "builtins.eval",
    "builtins.exec",
    "builtins.__import__",
    "cloudpickle.load",
    "cloudpickle.loads",
    "dill.load",
    "dill.loads",
    "joblib.load",
    "marshal.load",
    "marshal.loads",
    "os.popen",
    "os.system",
    "pandas.read_pickle",
    "pickle.Unpickler",
    "pickle.load",
    "pickle.loads",
    "shelve.open",
    "subprocess.getoutput",
    "yaml.full_load",
    "yaml.load",
    "yaml.load_all",
    "yaml.unsafe_load",
}
FORBIDDEN_TRUE = {"shell", "trust_remote_code", "allow_pickle"}


def imported_names(tree: ast.AST) -> dict[str, str]:
    """Local name to the dotted name it stands for."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """The dotted name an expression stands for, or nothing."""
    if isinstance(node, ast.Name):
        return names.get(node.id, f"builtins.{node.id}")
    if isinstance(node, ast.Attribute):
        base = dotted(node.value, names)
        return f"{base}.{node.attr}" if base else ""
    return ""


def is_constant(call: ast.Call, keyword: str, value: object) -> bool:
    return any(k.arg == keyword and isinstance(k.value, ast.Constant) and k.value.value is value for k in call.keywords)


def unsafe(source: str) -> list[str]:
    """Each unsafe use in ``source`` as ``line: what``."""
    tree = ast.parse(source)
    names = imported_names(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = dotted(node.func, names)
            if name in FORBIDDEN_CALLS:
                found.append(f"{node.lineno}: {name}")
            if name == "torch.load" and not is_constant(node, "weights_only", True):
                found.append(f"{node.lineno}: torch.load without weights_only=True")
            found += [f"{node.lineno}: {word}=True" for word in sorted(FORBIDDEN_TRUE) if is_constant(node, word, True)]
        elif isinstance(node, ast.ClassDef):
            # A restricted unpickler is one that decides itself which classes may be found.
            own = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
            bases = {dotted(base, names) for base in node.bases}
            if "pickle.Unpickler" in bases and "find_class" not in own:
                found.append(f"{node.lineno}: an Unpickler without find_class")
    return found


def test_no_unsafe_code(root):
    folders = [*root.glob("packages/*/src"), root / "tools", root / "examples"]
    files: list[Path] = sorted(path for folder in folders for path in folder.rglob("*.py"))
    assert files
    found = {str(path.relative_to(root)): unsafe(path.read_text(encoding="utf-8")) for path in files}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(f)",
        "import pickle as p\np.loads(b)",
        "from pickle import load\nload(f)",
        "from pickle import loads as read\nread(b)",
        "import pickle\nclass Mine(pickle.Unpickler):\n    pass",
        "eval('1')",
        "exec('x = 1')",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import torch\ntorch.load(path, weights_only=safe)",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import os\nos.system('ls')",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
    ],
)
def test_unsafe_code_is_found(source):
    assert unsafe(source)


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "import json\njson.load(f)",
        "import yaml\nyaml.safe_load(text)",
        "import torch\ntorch.load(path, weights_only=True)",
        "import torch\ntorch.compile(model)",
        "import pickle\nclass Mine(pickle.Unpickler):\n    def find_class(self, module, name):\n        raise KeyError",
        "import subprocess\nsubprocess.run(['ls'])",
        "import numpy as np\nnp.load(path)",
    ],
)
def test_safe_code_is_not(source):
    assert unsafe(source) == []
