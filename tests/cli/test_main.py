"""The command itself: verbs, versions, errors in one line, and no torch where none is due."""

from __future__ import annotations

import subprocess
import sys

import pytest

from weft import __version__
from weft.base.errors import ConfigError
from weft.cli import main as command


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        command.main(list(argv))
    out = capsys.readouterr()
    return int(caught.value.code or 0), out.out, out.err


def test_help_lists_every_verb(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(verb in out for verb in command.VERBS)
    assert run(capsys)[0] == 2


def test_version(capsys):
    command.main(["--version"])
    assert capsys.readouterr().out == f"weft {__version__}\n"


def test_an_unknown_verb_is_named(capsys):
    code, _, err = run(capsys, "serv")
    assert code == 2
    assert "unknown verb 'serv'" in err


def test_our_errors_are_one_line_without_a_trace(capsys, monkeypatch):
    class Verb:
        @staticmethod
        def main(argv: list[str]) -> int:
            raise ConfigError(f"cannot {argv[0]}")

    monkeypatch.setattr(command, "import_module", lambda name: Verb)
    code, out, err = run(capsys, "serve", "this")
    assert (code, out, err) == (2, "", "weft serve: cannot this\n")


@pytest.mark.parametrize("room", ["base", "graph", "cluster", "cost", "plan", "engine", "sim"])
def test_rooms_that_decide_load_no_torch(room):
    """Every module of the room but capture, which is the one that may."""
    code = f"""
import importlib, pkgutil, sys
package = importlib.import_module("weft.{room}")
for module in pkgutil.walk_packages(package.__path__, "weft.{room}."):
    if not module.name.startswith(("weft.graph.capture", "weft.graph.recorder")):
        importlib.import_module(module.name)
loaded = {{"torch", "transformers", "tokenizers", "safetensors"}} & set(sys.modules)
sys.exit(f"loaded {{loaded}}" if loaded else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_resolve_and_unknown_ones_do_not():
    import weft

    for name in weft.__all__:
        assert getattr(weft, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = weft.nope
