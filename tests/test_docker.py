"""The Dockerfile, as far as it can be checked without Docker: what it copies is there, what it runs is understood."""

from __future__ import annotations

import ast
import fnmatch
import json
import re
import shlex

from ldm2.cli import commands
from tests.helpers import ROOT

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
LINES = re.sub(r"\\\n\s*", "", TEXT).splitlines()
STAGES = re.findall(r"^FROM (\S+)(?: AS (\S+))?$", TEXT, re.MULTILINE)


def instructions(name: str) -> list[str]:
    """What stands behind an instruction, each time that it is given."""
    return [line.partition(" ")[2] for line in LINES if line.startswith(f"{name} ")]


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path of the first level out: its last line that fits decides."""
    found = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#") and fnmatch.fnmatch(path, line.lstrip("!")):
            found = not line.startswith("!")
    return found


def test_what_is_copied_is_there_and_reaches_the_build():
    copied = [word for line in instructions("COPY") for word in line.split()[:-1]]
    assert {"ldm2", "kernels", "setup.py", "constraints.txt"} <= set(copied)
    for path in copied:
        assert (ROOT / path).exists() and not ignored(path), path
    assert ignored(".git") and ignored("tests")


def test_each_variant_is_a_stage_and_installs_extras_that_exist():
    defaults = dict(line.split("=") for line in instructions("ARG"))
    names = [name for _, name in STAGES]
    assert defaults["VARIANT"] == "cpu" and {"torch-cpu", "torch-cuda"} <= set(names)
    known = [part.replace("${VARIANT}", "cpu").replace("${PYTHON}", defaults["PYTHON"]) for part, _ in STAGES]
    for number, base in enumerate(known):
        assert base in names[:number] or base == f"python:{defaults['PYTHON']}-slim"
    setup = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    keywords = (node for node in ast.walk(setup) if isinstance(node, ast.keyword))
    extras = next(each.value for each in keywords if each.arg == "extras_require")
    there = {key.value for key in extras.keys}
    for asked in re.findall(r"EXTRAS=(\S+)", TEXT):
        assert set(asked.split(",")) <= there
    pinned = re.search(r"^torch==.*", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[0]
    assert TEXT.count(f'"{pinned}"') == 2


def test_it_runs_as_a_user_without_rights_with_a_volume_for_models():
    last = TEXT[TEXT.rindex("\nFROM "):]
    user = re.search(r"^USER (\w+)$", last, re.MULTILINE)[1]
    assert user != "root" and f"--uid 1000 {user}" in last and last.index("\nUSER ") < last.index("\nENTRYPOINT ")
    assert instructions("VOLUME") == ["/models"] and "HF_HOME=/models" in last and f"chown {user} /models" in last


def test_its_commands_are_understood():
    assert json.loads(instructions("ENTRYPOINT")[0]) == ["ldm2"]
    [shown] = re.findall(r"^#.* ldm2:cuda (serve .*)$", TEXT, re.MULTILINE)
    for words in (json.loads(instructions("CMD")[-1]), shlex.split(shown)):
        args = commands.parser().parse_args(words)
        assert args.host == "0.0.0.0" and str(args.port) == instructions("EXPOSE")[0]


def test_its_health_check_is_a_program_that_asks_the_server():
    check = next(line for line in LINES if line.startswith("HEALTHCHECK"))
    python, option, code = json.loads(check[check.index("CMD ") + 4:])
    assert (python, option) == ("python", "-c")
    compile(code, "HEALTHCHECK", "exec")
    assert f"http://127.0.0.1:{instructions('EXPOSE')[0]}/health" in code
