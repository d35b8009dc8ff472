"""The command line in this process."""

import pytest

from ldm2.cli.commands import main


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run `ldm2 ARGUMENTS` in this process, in an empty folder -> exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call
