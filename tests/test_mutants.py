"""The list of mutants stays alive: each changes code that is there, and names tests that are there."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from tools.mutants import MUTANTS, Ended, Mutant, Server, judge, verdict

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@functools.cache
def functions_of(name: str) -> set[str]:
    """Names of the functions of a test file."""
    body = ast.parse(text_of(name)).body
    return {item.name for item in body if isinstance(item, ast.FunctionDef)}


def test_names_are_distinct():
    names = [mutant.name for mutant in MUTANTS]
    assert len(names) == len(set(names)) >= 25


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_code_that_is_there(mutant):
    """One place, to something else that Python can read."""
    text = text_of(mutant.file)
    broken = mutant.applied_to(text)
    assert broken != text and not mutant.file.startswith("tests/")
    compile(broken, mutant.file, "exec")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_names_tests_that_are_there(mutant):
    assert mutant.tests
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert name.partition("[")[0] in functions_of(file), test


def test_what_is_not_there_once_is_refused():
    mutant = Mutant("a fault", "src/a.py", "b", "c", ("tests/test_a.py::test_a",))
    assert mutant.applied_to("a b") == "a c"
    for text, n in (("a", 0), ("b b", 2)):
        with pytest.raises(ValueError, match=f"src/a.py has {n} times what 'a fault' changes"):
            mutant.applied_to(text)


@pytest.mark.parametrize(
    ("status", "failed", "said"),
    [
        (1, ("tests/test_a.py::test_a",), "killed"),
        (0, (), "survived"),
        (1, (), "survived (a fixture failed"),
        (2, (), "survived (no test ran: pytest's status is 2)"),  # it cannot be imported
        (2, ("tests/test_a.py::test_a",), "survived (no test ran"),
        (4, (), "survived (no test ran"),  # no such test
        (None, (), "survived (pytest did not end"),
    ],
)
def test_only_a_test_that_fails_kills(status, failed, said):
    assert verdict(Ended(status, failed, "")).startswith(said)


TOY = {
    "src/toy.py": "def double(x):\n    return 2 * x\n",
    "tests/test_toy.py": """
import pytest
from src.toy import double

@pytest.fixture
def four():
    return double(2)

def test_double():
    assert double(3) == 6

def test_fixture(four):
    assert four

def test_zero():
    assert double(0) == 0
""",
}
RETURN, TESTED = "    return 2 * x\n", ("test_double",)
# What is broken -> the new line, the tests, and what is said of it.
OUTCOMES = {
    "a wrong sum": ("    return 3 * x\n", ("test_zero", "test_double"), "killed"),
    "nothing that is tested": ("    return 3 * x\n", ("test_zero",), "survived"),
    "the syntax": ("    return 2 *\n", TESTED, "survived (no test ran: "),
    "the import": ("    return 2 * x\nimport nowhere\n", TESTED, "survived (no test ran: "),
    "a fixture alone": ("    raise OSError\n", ("test_fixture",), "survived (a fixture failed, no test)"),
    "a test that is not there": ("    return 3 * x\n", ("test_gone",), "survived (no test ran: "),
    "the process": ("    __import__('os').abort()\n", TESTED, "survived (pytest did not end"),
    "the end": ("    while True: pass\n", TESTED, "survived (pytest did not end"),
    "a wrong sum, once more": ("    return 4 * x\n", TESTED, "killed"),
}


@pytest.mark.slow
def test_mutants_of_a_toy(tmp_path, capsys, monkeypatch):
    """What is broken in one run is whole in the next; what does not fail by a test is not killed."""
    few = 'SLOW_TO_IMPORT = ("hypothesis", "pytest")'
    machinery = re.sub(r"SLOW_TO_IMPORT = \((?s:.*?)\n\)", few, text_of("tools/mutants.py"))
    for name, text in {**TOY, "tools/__init__.py": "", "tools/mutants.py": machinery}.items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(Server.run, "__defaults__", (10,))  # seconds
    mutants = [
        Mutant(name, "src/toy.py", RETURN, new, tuple(f"tests/test_toy.py::{test}" for test in tests))
        for name, (new, tests, _) in OUTCOMES.items()
    ]
    with Server(tmp_path / "copy") as server:
        assert server.run(["tests/test_toy.py"]).status == 0
        n_survived = judge(mutants, [server])
        assert server.run(["tests/test_toy.py"]).status == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(OUTCOMES) and n_survived == len(OUTCOMES) - 2
    for line, (name, (_, _, said)) in zip(lines, OUTCOMES.items(), strict=True):
        found, _, told = line.split(" | ")
        assert found.rstrip() == name and told.startswith(said) and (said != "survived" or told == said), line
